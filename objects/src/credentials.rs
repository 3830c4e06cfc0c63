//! Amazon's usual files: `~/.aws/credentials` and `~/.aws/config`.
//!
//! `object_store` reads the environment, web identities and the metadata of the machine, but no files. What
//! the environment has goes before them.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as Key};

use crate::error::{ObjectError, ObjectErrorKind};

/// Keys of the files, and what they are called here.
const KEYS: [(&str, Key); 5] = [
    ("aws_access_key_id", Key::AccessKeyId),
    ("aws_secret_access_key", Key::SecretAccessKey),
    ("aws_session_token", Key::Token),
    ("region", Key::Region),
    ("endpoint_url", Key::Endpoint),
];

/// Adds what the builder lacks from the files of the user.
pub(crate) fn complete(mut builder: AmazonS3Builder) -> Result<AmazonS3Builder, ObjectError> {
    // SDKs call it so; object_store has another name.
    if builder.get_config_value(&Key::Endpoint).is_none()
        && let Some(url) =
            ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].iter().find_map(|key| std::env::var(key).ok())
    {
        builder = builder.with_endpoint(url);
    }
    let profile = std::env::var("AWS_PROFILE").unwrap_or_else(|_| "default".to_owned());
    let is_asked = std::env::var_os("AWS_PROFILE").is_some();
    let files = [("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")];
    let mut found = HashMap::new();
    for (variable, name) in files {
        let Some(path) = path_of(variable, name) else { continue };
        let Ok(text) = fs::read_to_string(path) else { continue };
        for (key, value) in section(&text, &profile) {
            found.entry(key).or_insert(value);
        }
    }
    if is_asked && found.is_empty() {
        let text = format!("AWS_PROFILE names {}, which ~/.aws does not have", profile.escape_default());
        return Err(ObjectError::new(ObjectErrorKind::Denied, text));
    }
    // A key and its secret belong together.
    let has_keys = builder.get_config_value(&Key::AccessKeyId).is_some();
    for (name, key) in KEYS {
        let is_secret = name.starts_with("aws_");
        if (is_secret && has_keys) || (!is_secret && builder.get_config_value(&key).is_some()) {
            continue;
        }
        if let Some(value) = found.get(name) {
            builder = builder.with_config(key, value);
        }
    }
    Ok(builder)
}

/// Whether the builder knows of any, or is told to use none.
pub(crate) fn are_found(builder: &AmazonS3Builder) -> bool {
    let keys = [
        Key::AccessKeyId,
        Key::WebIdentityTokenFile,
        Key::ContainerCredentialsRelativeUri,
        Key::SkipSignature,
    ];
    keys.iter()
        .any(|key| builder.get_config_value(key).is_some_and(|value| !value.is_empty() && value != "false"))
}

fn path_of(variable: &str, name: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Some(path.into());
    }
    Some(PathBuf::from(std::env::var_os("HOME")?).join(".aws").join(name))
}

/// The keys and values of a profile: `[name]`, or `[profile name]` in `config`.
fn section(text: &str, profile: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut is_in = false;
    for line in text.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let name = name.trim();
            is_in = name.strip_prefix("profile ").unwrap_or(name).trim() == profile;
        } else if is_in
            && !line.starts_with(['#', ';'])
            && let Some((key, value)) = line.split_once('=')
        {
            found.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_has_its_own_keys() {
        let text =
            "# c\n[default]\naws_access_key_id = A\n; d\n\n[profile b ]\nregion=x\n[b]\nRegion = y\n[c]\n";
        let pairs = |profile| section(text, profile);
        assert_eq!(pairs("default"), [("aws_access_key_id".into(), "A".into())]);
        assert_eq!(pairs("b"), [("region".into(), "x".into()), ("region".into(), "y".into())]);
        assert_eq!(pairs("c"), []);
    }
}
