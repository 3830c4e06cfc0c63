//! Stores that many hands change in any order, beside models of what must be so.

mod owners;
mod strangers;
