//! Stores that many processes change in any order, beside reference models.

mod owners;
mod strangers;
