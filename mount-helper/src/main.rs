//! mount.chainfs: what mount(8) calls.
fn main() {}
