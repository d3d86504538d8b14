//! Integration tests of the `mongo-*` family on a real MongoDB; they are in `integration/`.
