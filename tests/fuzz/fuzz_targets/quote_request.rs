//! Fuzz target `quote_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("quote_request", data));
