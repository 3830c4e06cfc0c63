use super::Writer;
use crate::error::Result;
use crate::format::Snapshot;
impl Writer {
    /// x
    pub fn delete_snapshot(&self, _: &Snapshot) -> Result<()> {
        todo!()
    }
    /// x
    pub fn apply_snapshot(&self, _: &Snapshot) -> Result<()> {
        todo!()
    }
    /// x
    pub fn shrink(&self, _: u64) -> Result<()> {
        todo!()
    }
}
