//! TLS for the HTTP clients of this family. Not for hosts: its types are those of libraries whose versions may change.

use std::sync::Arc;

use rustls_platform_verifier::BuilderVerifierExt as _;

use crate::error::{Error, Result};

/// A configuration that uses ring whatever the process has chosen, and trusts whom the machine trusts.
///
/// # Errors
/// `Internal` if TLS has no version in common with itself.
pub fn client_config() -> Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = || {
        rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::internal("TLS cannot be set up").with_source(error))
    };
    Ok(match builder()?.with_platform_verifier() {
        Ok(builder) => builder.with_no_client_auth(),
        Err(error) => {
            // What is without TLS can be used all the same; what is with it will say that it is not trusted.
            tracing::warn!(%error, "the machine trusts no certificate authority");
            builder()?.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
        }
    })
}
