//! How mongodump names files after collections.

use std::fmt::Write as _;

use base64_url::encode;
use mongo_core::{Error, Result};
use sha1::{Digest as _, Sha1};

/// The name of a collection's files, without their endings.
pub(super) fn escape(collection: &str) -> String {
    let mut escaped = String::with_capacity(collection.len());
    for byte in collection.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => escaped.push(char::from(byte)),
            b' ' => escaped.push('+'),
            byte => {
                let _ = write!(escaped, "%{byte:02X}");
            }
        }
    }
    if escaped.len() <= LONGEST {
        return escaped;
    }
    // The cut may go through an escape; the true name is in the metadata.
    escaped.truncate(KEPT);
    escaped.push_str("%24");
    escaped.push_str(&encode(&Sha1::digest(collection.as_bytes())));
    escaped
}

/// Whether a name was cut off, so that the metadata must tell the true one.
pub(super) fn is_cut(name: &str) -> bool {
    name.len() == LONGEST && name.contains("%24")
}

/// The collection that a file is named after.
///
/// # Errors
/// `CorruptData` for a name that no collection can have given.
pub(super) fn unescape(name: &str) -> Result<String> {
    let wrong = || Error::corrupt("a file's name is not escaped as mongodump does").with_context("file", name.escape_debug());
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                let (high, low) = (digit().ok_or_else(wrong)?, digit().ok_or_else(wrong)?);
                u8::try_from(high * 16 + low).map_err(|_| wrong())?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

/// Unpadded base64 with the alphabet for URLs, of which only this one use is needed.
mod base64_url {
    pub(super) fn encode(bytes: &[u8]) -> String {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut text = String::new();
        for three in bytes.chunks(3) {
            let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
            for position in 0..=three.len() {
                text.push(char::from(ALPHABET[(bits >> (18 - 6 * position)) as usize & 63]));
            }
        }
        text
    }
}

const LONGEST: usize = 238;
const KEPT: usize = 208;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_those_of_mongodump() {
        assert_eq!(escape("orders"), "orders");
        assert_eq!(escape("a b/c%d"), "a+b%2Fc%25d");
        assert_eq!(escape("é.metadata"), "%C3%A9.metadata");
        let long = escape(&"é".repeat(200));
        assert_eq!((long.len(), is_cut(&long)), (238, true));
        // SHA-1 of 200 times é, by another implementation.
        assert!(long.ends_with("%24QfEfPW6NLteeQF3rb0OyOHFw9-4"), "{long}");
        assert!(unescape("%4").is_err() && unescape("%zz").is_err() && unescape("%ff").is_err());
    }

    proptest! {
        #[test]
        fn short_names_come_back(name in ".{1,60}") {
            let escaped = escape(&name);
            if !is_cut(&escaped) {
                prop_assert_eq!(unescape(&escaped).unwrap(), name);
            }
            prop_assert!(escaped.len() <= 238 && !escaped.contains('/'));
        }
    }
}
