//! Which reader a content needs.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

use super::content::Content;
use super::{FileSystem, Source};

/// Opens the file system of a volume that holds `content`. `Unsupported` if there is no reader for it.
pub fn open(content: Content, source: Arc<dyn Source>) -> Result<Arc<dyn FileSystem>> {
    let _ = source;
    let problem = content.problem().unwrap_or_else(|| "it has no reader".into());
    Err(Error::new(ErrorKind::Unsupported, problem))
}
