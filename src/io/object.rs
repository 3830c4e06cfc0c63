//! What an object of a store is known by: which one it is, and which version of it is there.
//!
//! Objects are what a store's files are to everything above this layer. The types here are opaque: they say
//! whether two objects are one, and whether one has changed. How a backend finds that out (a local directory:
//! by device, inode number and times) is known in this layer alone.

use std::fmt;

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds of that second.
    pub nanoseconds: u32,
}

/// Identifies an object among those that exist now. After it was removed, another one may get its id: an
/// [`Identity`] detects that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// What its number counts in: a file system, or a backend. A name can be moved only within one.
    space: u64,
    number: u64,
}

impl ObjectId {
    pub(super) const fn new(space: u64, number: u64) -> Self {
        Self { space, number }
    }

    /// Its number, which no other object of the same space has now. For names and notes.
    pub fn number(self) -> u64 {
        self.number
    }

    /// Whether both are in one space: only there can a name be moved from one place to another.
    pub fn is_near(self, other: Self) -> bool {
        self.space == other.space
    }
}

/// Identifies an object over its lifetime: by its id, and its birth time if the backend has that. The birth
/// time detects an id that was given to another object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    id: ObjectId,
    birth: Option<Timestamp>,
}

impl Identity {
    /// The identity that no object has.
    pub const NONE: Self = Self { id: ObjectId::new(0, 0), birth: None };

    /// An object of which the id and, if known, the birth time were found out.
    pub(super) fn new(id: ObjectId, birth: Option<Timestamp>) -> Self {
        Self { id, birth }
    }

    /// An object of which only the id is known.
    pub fn of_id(id: ObjectId) -> Self {
        Self { id, birth: None }
    }

    /// Its id.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// When the object was made, if the backend has that.
    pub fn birth(&self) -> Option<Timestamp> {
        self.birth
    }

    /// Whether both are the same object, as far as the backend reports.
    pub fn is(&self, other: &Self) -> bool {
        self.id == other.id && (self.birth.is_none() || other.birth.is_none() || self.birth == other.birth)
    }

    /// Whether the object that is met now is the one of which this was noted, possibly before the machine was
    /// started again: then its space may have another number.
    pub fn is_met_as(&self, found: &Self) -> bool {
        match (self.birth, found.birth) {
            (Some(noted_birth), Some(birth)) => self.id.number == found.id.number && noted_birth == birth,
            _ => self.id == found.id,
        }
    }

    /// Whether an object noted as `noted` and met now as `self` is a copy of it: number and birth differ.
    pub fn is_copy_of(&self, noted: &Self) -> bool {
        (self.id.number, self.birth) != (noted.id.number, noted.birth)
    }

    /// If this was noted in the space of `noted`, moves it to that of `now`: the same space under the number
    /// that it has since the machine was started again.
    pub fn follow(&mut self, noted: &Self, now: &Self) {
        if self.id.space == noted.id.space {
            self.id.space = now.id.space;
        }
    }

    /// Reads what [`fmt::Display`] has written.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let mut parts = text.split(':');
        let (space, object, birth) = (parts.next()?, parts.next()?, parts.next()?);
        let birth = match birth.split_once('.') {
            None if birth == "-" => None,
            None => return None,
            Some((seconds, nanoseconds)) => Some(Timestamp {
                seconds: number(seconds)?.cast_signed(),
                nanoseconds: u32::from_str_radix(nanoseconds, 16).ok()?,
            }),
        };
        let id = ObjectId::new(number(space)?, number(object)?);
        parts.next().is_none().then_some(Self { id, birth })
    }
}

/// `space:number:birth` in hexadecimal digits, `-` for a birth that is not known. Notes on disk have it so.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}:", self.id.space, self.id.number)?;
        match self.birth {
            None => f.write_str("-"),
            Some(birth) => write!(f, "{:x}.{:x}", birth.seconds.cast_unsigned(), birth.nanoseconds),
        }
    }
}

/// The version of an object: each change of its bytes makes another one. Versions are compared only with
/// versions of the same object, for equality.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectVersion(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// A file: its size in bytes, and when it was modified and changed.
    File { size: u64, modified: Timestamp, changed: Timestamp },
    /// A number that the backend gives to each version that it meets of an object, and to no other one.
    Tag(u64),
}

impl ObjectVersion {
    pub(super) fn of_file(size: u64, modified: Timestamp, changed: Timestamp) -> Self {
        Self(Kind::File { size, modified, changed })
    }

    pub(super) fn of_tag(tag: u64) -> Self {
        Self(Kind::Tag(tag))
    }
}

/// What a backend tells of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectStat {
    /// Its identity among present objects.
    pub id: ObjectId,
    /// Its version.
    pub version: ObjectVersion,
    /// Size in bytes.
    pub size: u64,
    /// When its bytes changed last; 1970 if the backend does not know.
    pub modified: Timestamp,
    /// Allocated blocks of 512 bytes.
    pub blocks: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that it has (hard links).
    pub link_count: u64,
}

impl ObjectStat {
    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// Whether its mode has any write bit.
    pub fn has_write_bit(&self) -> bool {
        self.mode & 0o222 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64, nanoseconds: u32) -> Timestamp {
        Timestamp { seconds, nanoseconds }
    }

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let id = ObjectId::new(0xfd01, u64::MAX);
        for birth in [None, Some(time(-5, 999_999_999)), Some(time(1_700_000_000, 0))] {
            let file = Identity { id, birth };
            assert_eq!(Identity::parse(&file.to_string()), Some(file));
        }
        let text = Identity::new(ObjectId::new(0xfd01, 0x2a), Some(time(0x10, 5))).to_string();
        assert_eq!(text, "fd01:2a:10.5", "notes on disk keep their form");
        for text in ["", "1:2", "1:2:3", "1:2:3.4:5", "x:2:-", "1:2:-1.0.0"] {
            assert_eq!(Identity::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_number_that_was_given_again_is_another_file() {
        let id = ObjectId::new(1, 2);
        let (old, new, unknown) = (Some(time(5, 1)), Some(time(5, 2)), None);
        let is = |a, b| Identity { id, birth: a }.is(&Identity { id, birth: b });
        assert!(is(old, old) && is(old, unknown) && !is(old, new));
    }
}
