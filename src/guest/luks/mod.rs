//! LUKS1 and LUKS2: encrypted volumes, opened with keys that the user gives.
//!
//! `header` has what both versions say (`luks1`, `luks2`), `unlock` finds the volume keys, `device` decrypts
//! (`cipher`, `hash`).
//!
//! Promises:
//! - A header is hostile: counts, costs, lengths and offsets are bounded before anything is computed or read.
//! - Secrets are overwritten when dropped, and appear in no message.
//! - Deriving a key is for a process of its own. With a volume key, opening costs a parse of the header.

mod base64;
mod cipher;
mod device;
mod hash;
mod header;
mod known;
mod luks1;
mod luks2;
mod secret;
#[cfg(test)]
mod tests;
mod unlock;

pub use device::{CipherId, DataCipher, DataSegment, Decryptor};
pub use header::HeaderId;
pub use known::{Attempt, ContainerKeys, KnownKeys};
pub(super) use luks2::SECOND_MAGIC;
pub use secret::Secret;
pub use unlock::{Unlocked, VolumeKeys};
