//! What the daemon says while it runs.

use tracing::Level;

/// Messages go to stderr: warnings, and more if asked for. A child's stderr ends with its start.
pub(super) fn start(verbose: bool, as_child: bool) {
    let level = match (verbose, as_child) {
        (true, _) => Level::DEBUG,
        (false, false) => Level::INFO,
        (false, true) => Level::WARN,
    };
    // Only the first caller of a process sets it up; tests may be several.
    let _ = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).try_init();
}
