//! A guest on an array.
