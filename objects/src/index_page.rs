//! Listing a web server: the pages of links that nginx, Apache and others make of a directory.
//!
//! Only links to what lies directly in the directory count. What a page says of sizes and dates is not read:
//! each file is asked for (HEAD).

use std::time::Duration;

use futures_util::StreamExt;
use object_store::GetOptions;
use reqwest::{Client, StatusCode};
use url::Url;

use crate::client::Bucket;
use crate::error::{ObjectError, ObjectErrorKind, innermost};
use crate::requests::{ObjectInfo, Patience, info};

/// Directories in each other, at most.
const MAX_DEPTH: usize = 16;
/// Pages and files together, at most.
const MAX_ENTRIES: usize = 100_000;
/// Bytes of a page, at most.
const MAX_PAGE: usize = 8 << 20;
/// Files that are asked for at a time.
const PARALLEL: usize = 16;

/// The pages of one web server's directory.
pub(crate) struct IndexPages {
    client: Client,
    root: Url,
}

impl IndexPages {
    pub(crate) fn new(url: &Url, patience: Patience) -> Result<Self, ObjectError> {
        let client = Client::builder()
            .connect_timeout(patience.attempt().min(Duration::from_secs(5)))
            .timeout(patience.attempt())
            .build()
            .map_err(|error| ObjectError::new(ObjectErrorKind::Failed, format!("{url}: {error}")))?;
        let mut root = url.clone();
        root.set_path(&format!("{}/", url.path().trim_end_matches('/')));
        Ok(Self { client, root })
    }

    /// All files beneath the root, sorted by name.
    pub(crate) fn list(&self, bucket: &Bucket) -> Result<Vec<ObjectInfo>, ObjectError> {
        let mut names = Vec::new();
        let mut directories = vec![(String::new(), 0)];
        while let Some((directory, depth)) = directories.pop() {
            for name in self.entries(bucket, &directory)? {
                let path = format!("{directory}{name}");
                match path.ends_with('/') {
                    true if depth < MAX_DEPTH => directories.push((path, depth + 1)),
                    true => {}
                    false => names.push(path),
                }
                if names.len() + directories.len() > MAX_ENTRIES {
                    let text = format!("{} has over {MAX_ENTRIES} files; name one directory", self.root);
                    return Err(ObjectError::new(ObjectErrorKind::Limit, text));
                }
            }
        }
        let shown = self.root.to_string();
        let mut found = bucket.call_long(&shown, || async {
            let mut asked = futures_util::stream::iter(names.iter().map(|name| stat(bucket, name)))
                .buffer_unordered(PARALLEL);
            let mut found = Vec::new();
            while let Some(answer) = asked.next().await {
                found.extend(answer?);
            }
            Ok(found)
        })?;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The names on the page of a directory; those of directories end with `/`.
    fn entries(&self, bucket: &Bucket, directory: &str) -> Result<Vec<String>, ObjectError> {
        let mut url = self.root.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(directory.split_terminator('/')).push("");
        }
        let shown = url.to_string();
        let page = bucket.call(&shown, || async {
            let failed = |error: reqwest::Error| {
                let text = format!("{shown} could not be reached: {}", innermost(&error.without_url()));
                ObjectError::new(ObjectErrorKind::Failed, text)
            };
            let reply = self.client.get(url.clone()).send().await.map_err(failed)?;
            match reply.status() {
                StatusCode::OK => {}
                StatusCode::NOT_FOUND | StatusCode::FORBIDDEN => {
                    let text = format!("{shown} is not listed by its server; name a directory that is");
                    return Err(ObjectError::new(ObjectErrorKind::NotFound, text));
                }
                StatusCode::UNAUTHORIZED => {
                    let text = format!("{shown} needs credentials, and none are sent to web servers");
                    return Err(ObjectError::new(ObjectErrorKind::Denied, text));
                }
                status => {
                    let text = format!("{shown} could not be listed: the server answers {status}");
                    return Err(ObjectError::new(ObjectErrorKind::Failed, text));
                }
            }
            // A server may answer with a file although the address ends with a slash.
            let kind = reply.headers().get("content-type").and_then(|kind| kind.to_str().ok());
            if !kind.is_some_and(|kind| kind.starts_with("text/html")) {
                let text = format!("{shown} is no directory that its server lists");
                return Err(ObjectError::new(ObjectErrorKind::NotFound, text));
            }
            let mut page = Vec::new();
            let mut body = reply.bytes_stream();
            while let Some(part) = body.next().await {
                page.extend_from_slice(&part.map_err(failed)?);
                if page.len() > MAX_PAGE {
                    let text = format!("{shown} has a page of over {MAX_PAGE} bytes");
                    return Err(ObjectError::new(ObjectErrorKind::Limit, text));
                }
            }
            Ok(String::from_utf8_lossy(&page).into_owned())
        })?;
        Ok(links(&page, &url))
    }
}

async fn stat(bucket: &Bucket, name: &str) -> Result<Option<ObjectInfo>, ObjectError> {
    let (path, shown) = bucket.path_of(name)?;
    match bucket.store().get_opts(&path, GetOptions::new().with_head(true)).await {
        Ok(found) => Ok(Some(info(name.to_owned(), &found.meta))),
        // It was removed since, or it is a page that cannot be read as a file.
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(ObjectError::of(&shown, &error)),
    }
}

/// What a page links to and lies directly in its directory, each once.
fn links(page: &str, directory: &Url) -> Vec<String> {
    let mut found = Vec::new();
    for part in page.split("href=").skip(1) {
        let Some(quote) = part.chars().next().filter(|c| matches!(c, '"' | '\'')) else { continue };
        let Some(target) = part[1..].split(quote).next() else { continue };
        let Ok(target) = directory.join(&target.replace("&amp;", "&")) else { continue };
        let is_here = target.origin() == directory.origin() && target.query().is_none();
        let Some(rest) = target.path().strip_prefix(directory.path()).filter(|_| is_here) else { continue };
        let name = rest.strip_suffix('/').unwrap_or(rest);
        let Ok(decoded) = object_store::path::Path::from_url_path(name) else { continue };
        if decoded.parts().count() == 1 {
            found.push(if rest.ends_with('/') { format!("{decoded}/") } else { decoded.to_string() });
        }
    }
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_links_into_the_directory_count() {
        let page = r#"<a href="../">..</a> <a href="a.qcow2">a</a> <A href='sub/'>s</a>
            <a href="/vm/b%20c.raw">b</a>
            <a href="?C=N;O=D">N</a> <a href="sub/deep.raw">d</a> <a href="https://other.org/vm/x">x</a>
            <a href="/etc/passwd">p</a> <a href=plain>q</a> <a href="a.qcow2">again</a> <a href="./">.</a>"#;
        let url = Url::parse("http://h:1/vm/").unwrap();
        assert_eq!(links(page, &url), ["a.qcow2", "b c.raw", "sub/"]);
    }
}
