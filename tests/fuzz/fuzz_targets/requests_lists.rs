//! Fuzz target `requests_lists`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("requests_lists", data));
