//! Which operating system there is on a guest's volumes.

use serde::{Deserialize, Serialize};

/// An operating system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatingSystem {
    /// The volume that holds its root.
    pub volume: String,
}
