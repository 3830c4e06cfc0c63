//! Addresses of buckets: `s3://bucket/prefix` and its like.

use std::fmt;

use url::Url;

use crate::error::{ObjectError, ObjectErrorKind};

/// The protocol of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// Amazon S3 and whatever speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure Blob Storage.
    Azure,
    /// A web server that answers ranges. It is read-only.
    Http,
}

/// Where a bucket is. It has no credentials in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    service: Service,
    /// Normalised: no `/` at the end, no query.
    url: Url,
}

impl Location {
    /// Whether `text` is meant as an address, and not as a path.
    pub fn is_meant(text: &str) -> bool {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| {
            !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
    }

    /// Reads an address. Errors: a scheme that is not known, no bucket, a password, a query.
    pub fn parse(text: &str) -> Result<Self, ObjectError> {
        // The text is not repeated: it may have a password in it.
        let usage = |fact: &str| ObjectError::new(ObjectErrorKind::Usage, fact);
        let mut url =
            Url::parse(text).map_err(|error| usage(&format!("the address of the store: {error}")))?;
        let service = match url.scheme() {
            "s3" => Service::S3,
            "gs" => Service::Google,
            "az" => Service::Azure,
            "http" | "https" => Service::Http,
            other => {
                let known = "known are s3://, gs://, az://, https:// and http://";
                return Err(usage(&format!("stores cannot be at {}://; {known}", other.escape_default())));
            }
        };
        if !url.username().is_empty() || url.password().is_some() {
            let remedy = "give credentials in the environment or in the usual files";
            return Err(usage(&format!("the address of a store has no name or password in it; {remedy}")));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(usage("the address of a store ends before '?' and '#'"));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(usage("the address of a store names a bucket: s3://BUCKET/PREFIX"));
        }
        let path = url.path().trim_end_matches('/').to_owned();
        url.set_path(&path);
        Ok(Self { service, url })
    }

    /// Its protocol.
    pub fn service(&self) -> Service {
        self.service
    }

    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// The prefix of all names of objects, decoded, without `/` at either end.
    pub(crate) fn prefix(&self) -> Result<object_store::path::Path, ObjectError> {
        let path = self.url.path().trim_start_matches('/');
        object_store::path::Path::from_url_path(path)
            .map_err(|error| ObjectError::new(ObjectErrorKind::Usage, format!("{self}: {error}")))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.as_str().trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_normalised() {
        for (text, shown, prefix) in [
            ("s3://images", "s3://images", ""),
            ("s3://images/", "s3://images", ""),
            ("s3://images/golden/x//", "s3://images/golden/x", "golden/x"),
            ("https://example.org/vm%20images", "https://example.org/vm%20images", "vm images"),
        ] {
            let location = Location::parse(text).unwrap();
            assert_eq!((location.to_string().as_str(), location.prefix().unwrap().as_ref()), (shown, prefix));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_without_repeating_secrets() {
        for text in ["s3:///x", "ftp://x/y", "s3://key:hunter2@bucket", "https://x/y?sig=hunter2", "nonsense"]
        {
            let error = Location::parse(text).unwrap_err();
            assert_eq!(error.kind(), ObjectErrorKind::Usage, "{text}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        assert!(Location::is_meant("s3://x") && Location::is_meant("foo://x"));
        assert!(
            !Location::is_meant("/srv/vm") && !Location::is_meant("a/b://c") && !Location::is_meant("://")
        );
    }
}
