//! Sealing: what an encrypted repository stores is XChaCha20-Poly1305, with a random nonce in front and the tag behind.
//!
//! The nonce has 192 bits, so random ones may be used with one key for ever. What is sealed together with *associated data* opens
//! only where the same data is given: the repository's id and what the bytes are, so that a piece cannot stand in for another.

use chacha20poly1305::{AeadInOut as _, KeyInit as _, Tag, XChaCha20Poly1305, XNonce};
use mongo_core::{Error, Result};

/// The repository's cipher.
#[derive(Clone)]
pub(crate) struct Cipher {
    aead: XChaCha20Poly1305,
    repository: [u8; 16],
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cipher")
    }
}

impl Cipher {
    pub(crate) fn new(key: &[u8; 32], repository: [u8; 16]) -> Self {
        Self { aead: XChaCha20Poly1305::new(key.into()), repository }
    }

    /// Appends nonce, sealed bytes and tag to `out`.
    pub(crate) fn seal_into(&self, purpose: &[u8], plain: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let mut nonce = [0; NONCE];
        random(&mut nonce)?;
        self.seal_with(nonce, purpose, plain, out)
    }

    fn seal_with(&self, nonce: [u8; NONCE], purpose: &[u8], plain: &[u8], out: &mut Vec<u8>) -> Result<()> {
        out.reserve(OVERHEAD + plain.len());
        out.extend_from_slice(&nonce);
        let start = out.len();
        out.extend_from_slice(plain);
        let tag = self
            .aead
            .encrypt_inout_detached(&XNonce::from(nonce), &self.associated(purpose), (&mut out[start..]).into())
            .map_err(|_| Error::internal("more bytes than can be encrypted at once"))?;
        out.extend_from_slice(&tag);
        Ok(())
    }

    /// The plain bytes; none if they were not sealed with this key, in this repository, for this purpose.
    pub(crate) fn open(&self, purpose: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE>()?;
        let (body, tag) = rest.split_last_chunk::<TAG>()?;
        let mut plain = body.to_vec();
        let opened = self.aead.decrypt_inout_detached(
            &XNonce::from(*nonce),
            &self.associated(purpose),
            plain.as_mut_slice().into(),
            &Tag::from(*tag),
        );
        opened.ok().map(|()| plain)
    }

    fn associated(&self, purpose: &[u8]) -> Vec<u8> {
        [&self.repository, purpose].concat()
    }
}

/// Fills `bytes` with randomness.
pub(crate) fn random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| Error::internal(format!("no randomness to be had: {error}")))
}

const NONCE: usize = 24;
const TAG: usize = 16;
/// By how much sealed bytes are longer.
pub(crate) const OVERHEAD: usize = NONCE + TAG;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealed(cipher: &Cipher, purpose: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        cipher.seal_into(purpose, plain, &mut out).unwrap();
        out
    }

    proptest! {
        #[test]
        fn opens_what_it_sealed_and_nothing_that_was_changed(
            plain in proptest::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            bit in 0_u8..8,
        ) {
            let cipher = Cipher::new(&[1; 32], [2; 16]);
            let mut bytes = sealed(&cipher, b"block", &plain);
            prop_assert_eq!(bytes.len(), plain.len() + OVERHEAD);
            prop_assert_eq!(cipher.open(b"block", &bytes), Some(plain));
            let at = at.index(bytes.len());
            prop_assert_eq!(cipher.open(b"block", &bytes[..at]), None);
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(cipher.open(b"block", &bytes), None);
        }
    }

    #[test]
    fn another_key_repository_or_purpose_opens_nothing() {
        let bytes = sealed(&Cipher::new(&[1; 32], [2; 16]), b"block", b"plain");
        assert_eq!(Cipher::new(&[3; 32], [2; 16]).open(b"block", &bytes), None);
        assert_eq!(Cipher::new(&[1; 32], [3; 16]).open(b"block", &bytes), None);
        assert_eq!(Cipher::new(&[1; 32], [2; 16]).open(b"frame", &bytes), None);
    }

    #[test]
    fn test_vector() {
        // Also in docs/format.md.
        let mut out = Vec::new();
        Cipher::new(&[1; 32], [2; 16]).seal_with([3; 24], b"block", b"plain", &mut out).unwrap();
        assert_eq!(hex::encode(&out[24..]), "3e6c6e189ec7d87042a3c2487d0a4b4a26b3788c46");
    }
}
