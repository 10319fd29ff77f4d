//! Fuzz target `responses_order_audit`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("responses_order_audit", data));
