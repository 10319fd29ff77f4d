//! Fuzz target `blob_replies`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("blob_replies", data));
