//! Tests that need a process of their own, because they measure or change process-wide state.

use std::env;
use std::process::Command;

/// Set in the process that a test has to itself.
const ALONE: &str = "CHAINFS_TEST_ALONE";

/// Whether this process is the test's own. If not, the test has been run in one, and has succeeded there.
///
/// The arguments are the caller's `module_path!()` and its name.
pub fn is_alone(module: &str, test: &str) -> bool {
    if env::var_os(ALONE).is_some() {
        return true;
    }
    let (_, module) = module.split_once("::").expect("tests are in modules of their binary");
    let binary = env::current_exe().expect("the path of this binary");
    let mut command = Command::new(binary);
    command.args(["--exact", &format!("{module}::{test}"), "--nocapture"]).env(ALONE, "1");
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print!("{said}");
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    assert!(said.contains("1 passed"), "there is no {module}::{test}\n{said}");
    false
}
