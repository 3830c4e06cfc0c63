//! The command line: what people type, before anything is done about it.
