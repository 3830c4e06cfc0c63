//! What can go wrong between here and an object.

use std::error::Error;
use std::fmt;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectErrorKind {
    /// There is no such object.
    NotFound,
    /// The object is another version than the one that was asked for, or exists although it must not.
    Changed,
    /// The server does not let these credentials do it, or there are none.
    Denied,
    /// No good answer came before the deadline.
    TimedOut,
    /// The server cannot be reached, or answers with errors or with what was not asked for.
    Failed,
    /// The server has no such request.
    Unsupported,
    /// More was found than this program deals with.
    Limit,
    /// The address makes no sense.
    Usage,
}

/// A failed request. Its text names the object, the fact and, if there is one, the remedy.
#[derive(Clone, Debug)]
pub struct ObjectError {
    kind: ObjectErrorKind,
    text: String,
}

impl ObjectError {
    pub(crate) fn new(kind: ObjectErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// What `object_store` reports of `object`.
    pub(crate) fn of(object: &str, error: &object_store::Error) -> Self {
        use object_store::Error as E;
        let (kind, fact) = match error {
            E::NotFound { .. } => (ObjectErrorKind::NotFound, "does not exist".to_owned()),
            E::Precondition { .. } | E::NotModified { .. } => {
                (ObjectErrorKind::Changed, "was changed by another program".to_owned())
            }
            // 409 is also S3's answer if two conditional writes meet.
            E::AlreadyExists { .. } => {
                (ObjectErrorKind::Changed, "exists already, or is being changed".to_owned())
            }
            E::PermissionDenied { .. } => {
                (ObjectErrorKind::Denied, "may not be accessed with the present credentials".to_owned())
            }
            E::Unauthenticated { .. } => {
                let fact = "needs credentials, or those that were found have expired";
                (ObjectErrorKind::Denied, fact.to_owned())
            }
            E::NotSupported { .. } | E::NotImplemented { .. } => {
                (ObjectErrorKind::Unsupported, "lies on a server that cannot do that".to_owned())
            }
            error if error.to_string().contains("ExpiredToken") => (
                ObjectErrorKind::Denied,
                "needs credentials, and those that were found have expired".to_owned(),
            ),
            error => match status_of(error) {
                Some(401 | 403) => {
                    (ObjectErrorKind::Denied, "may not be accessed with the present credentials".to_owned())
                }
                Some(404) => (ObjectErrorKind::NotFound, "does not exist".to_owned()),
                Some(409 | 412) => (ObjectErrorKind::Changed, "was changed by another program".to_owned()),
                Some(code @ 400..=499) if ![408, 425, 429].contains(&code) => {
                    let fact = format!("is refused by its server: {}", innermost(error));
                    (ObjectErrorKind::Unsupported, fact)
                }
                _ => (ObjectErrorKind::Failed, format!("could not be reached: {}", innermost(error))),
            },
        };
        Self::new(kind, format!("{object} {fact}"))
    }

    /// The same, and what else is to be known.
    pub(crate) fn with(mut self, hint: Option<&str>) -> Self {
        if let Some(hint) = hint {
            self.text = format!("{}; {hint}", self.text);
        }
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ObjectErrorKind {
        self.kind
    }

    /// Whether the same request may succeed in a moment.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.kind, ObjectErrorKind::Failed | ObjectErrorKind::TimedOut)
    }
}

impl fmt::Display for ObjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for ObjectError {}

/// The status code of a reply, which `object_store` tells in words alone.
fn status_of(error: &object_store::Error) -> Option<u16> {
    let text = error.to_string();
    let rest = text.split_once("status code: ").map(|(_, rest)| rest)?;
    rest.get(..3)?.parse().ok()
}

/// The innermost cause: the outer ones repeat the address. Bodies of error pages are cut to a line.
pub(crate) fn innermost(error: &dyn Error) -> String {
    const MAX_TEXT: usize = 200;
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    let text = last.to_string();
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason was given").trim();
    // A signed address is as good as a key.
    let line = line.split_once('?').map_or(line, |(before, _)| before);
    line.chars().take(MAX_TEXT).filter(|c| !c.is_control()).collect()
}
