//! Integration tests of the `mongo-*` family on a real MongoDB; they are in `integration/`.

/// The README's program must compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[derive(Debug)]
pub struct Readme;
