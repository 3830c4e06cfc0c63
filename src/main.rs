//! The `chainfs` command.

fn main() {}
