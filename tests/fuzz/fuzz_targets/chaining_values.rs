//! Fuzz target `chaining_values`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("chaining_values", data));
