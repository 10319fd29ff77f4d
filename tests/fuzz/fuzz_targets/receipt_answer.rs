//! Fuzz target `receipt_answer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("receipt_answer", data));
