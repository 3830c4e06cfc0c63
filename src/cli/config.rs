//! Configuration files: default mount options.
//!
//! `/etc/chainfs.toml`, then `$XDG_CONFIG_HOME/chainfs/config.toml`, then `-o`: later ones hold, lists
//! are joined. The keys are the names of the options. An unknown key, or a value of the wrong type, is an
//! error that names file and key: a misspelt `readonly` must not be ignored silently.

use super::mount_options::{MountOptions, SETTINGS, Takes, suggestion};
use crate::error::{Error, ErrorKind, Result};
use crate::report::safe::{terminal, terminal_bytes};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use toml::de::DeTable;
use toml::{Table, Value};

/// The system-wide configuration file.
pub const SYSTEM_FILE: &str = "/etc/chainfs.toml";

/// `options`, completed by the file of `config=` or else by the default configuration files.
///
/// `variable` looks up an environment variable.
pub fn load(options: MountOptions, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<MountOptions> {
    if let Some(path) = &options.config {
        let file = read(path)?.ok_or_else(|| {
            let shown = terminal_bytes(path.as_os_str().as_bytes());
            Error::new(ErrorKind::NotFound, format!("{shown}: no such file; correct config="))
        })?;
        return Ok(options.over(file));
    }
    let mut defaults = MountOptions::default();
    for path in usual_files(variable) {
        if let Some(file) = read(&path)? {
            defaults = file.over(defaults);
        }
    }
    Ok(options.over(defaults))
}

/// The default files, the system's before the user's; a missing file is no error.
pub fn usual_files(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let user = user_directory(variable).map(|home| home.join("chainfs/config.toml"));
    [PathBuf::from(SYSTEM_FILE)].into_iter().chain(user).collect()
}

/// The directory of a user's configuration files. Relative paths do not count.
pub(super) fn user_directory(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
    absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")))
}

/// Parses the text of a file; `name` is its name in errors.
pub fn parse(text: &str, name: &str) -> Result<MountOptions> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error
            .span()
            .map_or(1, |span| text.bytes().take(span.start).filter(|byte| *byte == b'\n').count() + 1);
        Error::new(ErrorKind::Usage, format!("{name}: line {line}: {}", terminal(error.message().trim())))
    })?;
    let mut options = MountOptions::default();
    for (key, value) in &table {
        set(&mut options, key, value).map_err(|error| at(error, text, name, key))?;
    }
    Ok(options)
}

/// An error about a key, with the file and line of the key.
fn at(error: Error, text: &str, name: &str, key: &str) -> Error {
    let table = DeTable::parse(text).ok();
    let start = table.and_then(|table| {
        table.get_ref().keys().find(|known| known.get_ref() == key).map(|k| k.span().start)
    });
    let line = start.map(|start| text[..start].matches('\n').count() + 1);
    error.within(line.map_or_else(|| name.to_owned(), |line| format!("{name}: line {line}")))
}

/// Checks that the directories named in a file exist. Without them the mount fails with an error that does
/// not point to the configuration file.
fn check_directories(options: &MountOptions, text: &str, name: &str) -> Result<()> {
    let missing =
        options.backing_dirs.iter().find_map(|place| Some((place, std::fs::read_dir(place).err()?)));
    let Some((place, error)) = missing else { return Ok(()) };
    let shown = terminal_bytes(place.as_os_str().as_bytes());
    let fact = format!("key 'backing_dir': opening {shown}");
    Err(at(Error::io(fact, error), text, name, "backing_dir"))
}

fn set(options: &mut MountOptions, key: &str, value: &Value) -> Result<()> {
    let refuse = |why: &str| Error::new(ErrorKind::Usage, format!("key '{}': {why}", terminal(key)));
    let Some((_, takes)) = SETTINGS.iter().find(|(known, _)| *known == key) else {
        let settable = |meant: &&str| SETTINGS.iter().any(|(known, _)| known == meant);
        let remedy = suggestion(key).filter(settable).map(|meant| format!("; did you mean '{meant}'?"));
        return Err(refuse(&format!("unknown{}", remedy.unwrap_or_default())));
    };
    match (takes, value) {
        (Takes::Nothing, Value::Boolean(true)) => options.set(key, b""),
        (Takes::Nothing, Value::Boolean(false)) => Ok(()),
        (Takes::Nothing, _) => Err(refuse("must be true or false")),
        (Takes::Values, Value::Array(values)) => values.iter().try_for_each(|value| one(options, key, value)),
        (Takes::Value | Takes::Values, value) => one(options, key, value),
    }
}

fn one(options: &mut MountOptions, key: &str, value: &Value) -> Result<()> {
    let refuse = |why: &str| Error::new(ErrorKind::Usage, format!("key '{key}': {why}"));
    let text = match value {
        Value::String(text) if text.is_empty() => return Err(refuse("is empty")),
        // In TOML, 022 without quotes is a syntax error, and 22 would be decimal.
        Value::Integer(_) if key == "umask" => return Err(refuse("must be text, as in \"027\"")),
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        _ => return Err(refuse("must be text or a number")),
    };
    let is_relative = matches!(key, "backing_dir" | "keys") && !Path::new(&text).is_absolute();
    if is_relative {
        return Err(refuse("must be an absolute path"));
    }
    options.set(key, text.as_bytes()).map_err(|error| error.within(format!("key '{key}'")))
}

/// Refuses a file that other users could have written: the system's file may be writable by root alone, other
/// files by root and the user.
fn check_trust(path: &Path, name: &str, file: &std::fs::Metadata) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let (own, is_system) = (rustix::process::geteuid().as_raw(), path == Path::new(SYSTEM_FILE));
    let refuse = |why: String| {
        let owner = if is_system { "root".to_owned() } else { format!("root or uid {own}") };
        let fact = format!(
            "{name}: {why}, so it is not trusted; make it owned by {owner}, and writable by nobody else"
        );
        Err(Error::new(ErrorKind::Denied, fact))
    };
    if file.uid() != 0 && (is_system || file.uid() != own) {
        return refuse(format!("belongs to uid {}", file.uid()));
    }
    // Group write access is accepted for user files: on many systems each user has a private group.
    let bits = if is_system { 0o022 } else { 0o002 };
    if file.mode() & bits != 0 {
        return refuse(format!("can be written by others (mode {:o})", file.mode() & 0o7777));
    }
    Ok(())
}

fn read(path: &Path) -> Result<Option<MountOptions>> {
    let name = terminal_bytes(path.as_os_str().as_bytes());
    let read = || -> io::Result<_> {
        let mut file = std::fs::File::open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok((file.metadata()?, text))
    };
    match read() {
        Ok((file, text)) => {
            check_trust(path, &name, &file)?;
            let options = parse(&text, &name)?;
            check_directories(&options, &text, &name)?;
            Ok(Some(options))
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(Error::io(format!("reading {name}"), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_sets_the_same_options_as_the_command_line() {
        let file = r#"
            ro = true
            allow_other = false
            uid = 1000
            umask = "027"
            cache = "64M"
            backing_dir = ["/srv/a", "/srv/b,c"]
            map = "/old=/new"
            format = ["*.img:raw"]
            rescan = 30
        "#;
        let options =
            ["ro,uid=1000,umask=027,cache=64M,backing_dir=/srv/a,backing_dir=/srv/b\\,c,map=/old=/new,\
             rescan=30"];
        let mut expected = MountOptions::parse(&options, false).unwrap();
        expected.formats = MountOptions::parse(&["format=*.img:raw"], false).unwrap().formats;
        assert_eq!(parse(file, "f").unwrap(), expected);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (text, said) in [
            ("readnly = \"x\"", "f: line 1: key 'readnly': unknown; did you mean 'readonly'?"),
            ("nofail = true", "f: line 1: key 'nofail': unknown"),
            ("config = \"/x\"", "f: line 1: key 'config': unknown"),
            ("ro = 1", "f: line 1: key 'ro': must be true or false"),
            ("uid = true", "f: line 1: key 'uid': must be text or a number"),
            ("uid = [1]", "f: line 1: key 'uid': must be text or a number"),
            ("umask = 22", "f: line 1: key 'umask': must be text, as in \"027\""),
            ("backing_dir = \"x\"", "f: line 1: key 'backing_dir': must be an absolute path"),
            (
                "uid = -1",
                "f: line 1: key 'uid': mount option 'uid': '-1' must be a number from 0 to 4294967294",
            ),
        ] {
            assert_eq!(parse(text, "f").unwrap_err().to_string(), said);
        }
        let error = parse("ro = true\n\n'uid' = -1\n", "f").unwrap_err().to_string();
        assert!(error.starts_with("f: line 3: key 'uid': "), "{error}");
        let error = parse("ro = true\n\nuid = = 3\n", "f").unwrap_err().to_string();
        assert!(error.starts_with("f: line 3: "), "{error}");
        assert!(parse("ro = true\nro = true", "f").unwrap_err().to_string().starts_with("f: line 2: "));
    }

    #[test]
    fn a_missing_backing_directory_is_reported_with_its_line() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("c.toml");
        std::fs::write(&file, "ro = true\nbacking_dir = [\"/nonexistent/templates\"]\n").unwrap();
        let options = MountOptions { config: Some(file.clone()), ..MountOptions::default() };
        let said = load(options, |_| None).unwrap_err().to_string();
        let fact = "line 2: key 'backing_dir': opening /nonexistent/templates: No such file or directory";
        assert_eq!(said, format!("{}: {fact}", file.display()));
    }

    #[test]
    fn the_users_file_is_found_by_the_xdg_rules() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| {
                pairs.iter().find(|(known, _)| *known == name).map(|(_, path)| PathBuf::from(path))
            }
        };
        let user = |pairs| usual_files(env(pairs)).get(1).cloned();
        assert_eq!(user(&[("HOME", "/h")]), Some("/h/.config/chainfs/config.toml".into()));
        assert_eq!(user(&[("HOME", "/h"), ("XDG_CONFIG_HOME", "/x")]), Some("/x/chainfs/config.toml".into()));
        assert_eq!(
            user(&[("HOME", "/h"), ("XDG_CONFIG_HOME", "x")]),
            Some("/h/.config/chainfs/config.toml".into())
        );
        assert_eq!(user(&[]), None);
    }

    #[test]
    fn the_file_of_the_config_option_must_exist() {
        let options = MountOptions::parse(&["config=/nonexistent/chainfs.toml"], false).unwrap();
        let error = load(options, |_| None).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent/chainfs.toml: no such file; correct config=");
    }
}
