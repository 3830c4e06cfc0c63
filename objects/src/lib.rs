//! The objects of a bucket: listed and read in ranges, for callers with threads.
//!
//! A [`Bucket`] is a prefix in S3, Google Cloud Storage or Azure, or a web server's directory. It promises:
//!
//! - **Every call ends** by its deadline. Until then it is tried again where that may help, and a read that
//!   takes longer than most is sent a second time.
//! - **A read returns exactly what was asked for, of the version that was asked for**, or an error. The
//!   server is not believed: length, range and entity tag of each reply are checked. Whether the *bytes* are
//!   right is for the caller to verify.
//! - **No secret leaves**: keys are in no message and in no [`fmt::Debug`](std::fmt::Debug).
//!
//! Requests are made by the crate `object_store`, in a runtime of this crate's own.

mod client;
mod credentials;
mod error;
mod index_page;
mod latency;
mod location;
mod requests;

pub use client::Bucket;
pub use error::{ObjectError, ObjectErrorKind};
pub use location::{Location, Service};
pub use requests::{Counters, ObjectInfo, Patience};
