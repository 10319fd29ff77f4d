//! Fuzz target `requests_order_audit`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("requests_order_audit", data));
