//! What other tools have written: mongodump's archives, and the metadata and names of its files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mongo_backup::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::archive(bytes);
    // Most inputs would fail at the first four bytes.
    fuzzing::archive(&[&[0x6d, 0xe2, 0x99, 0x81], bytes].concat());
    if let Ok(text) = std::str::from_utf8(bytes) {
        fuzzing::metadata(text);
    }
});
