//! Any bytes as an image to be audited.
#![no_main]

use chainfs::image::check::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(report) = check(&bytes.to_vec(), "image") {
        assert_eq!(report.exit_code() == 0, report.findings.is_empty());
    }
});
