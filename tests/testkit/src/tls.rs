//! Certificates for one deployment: an authority, the servers' certificate and a client's.

use std::{
    fs::OpenOptions,
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::{Error, Result};

/// The files of one deployment's authority, in PEM form.
#[derive(Clone, Debug)]
pub(crate) struct Tls {
    /// The authority's certificate: what a client trusts.
    pub(crate) ca: PathBuf,
    /// The servers' certificate and key.
    pub(crate) server: PathBuf,
    /// A client's certificate and key.
    pub(crate) client: PathBuf,
}

impl Tls {
    /// Makes a new authority and what it signs, in `folder`.
    pub(crate) fn generate(folder: &Path) -> Result<Self> {
        let (ca, server, client) = certificates().map_err(|error| Error::Server(format!("cannot make certificates: {error}")))?;
        let files = Self { ca: folder.join("ca.pem"), server: folder.join("server.pem"), client: folder.join("client.pem") };
        write_private(&files.ca, &ca)?;
        write_private(&files.server, &server)?;
        write_private(&files.client, &client)?;
        Ok(files)
    }
}

/// Writes a file that only its owner can read, as mongod demands of a key file.
pub(crate) fn write_private(path: &Path, content: &str) -> Result<()> {
    let write =
        || OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(content.as_bytes());
    write().map_err(Error::path("write", path))
}

fn certificates() -> Result<(String, String, String), rcgen::Error> {
    let mut ca = CertificateParams::default();
    ca.distinguished_name = name("authority");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    let certificate = ca.self_signed(&key)?.pem();
    let issuer = Issuer::new(ca, key);

    let mut server = CertificateParams::default();
    server.distinguished_name = name("server");
    server.subject_alt_names =
        vec![SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)), SanType::DnsName("localhost".try_into()?)];
    // Members are clients of each other with the same certificate.
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];

    let mut client = CertificateParams::default();
    // Another unit than the server's: a client with the same one would pass for a member of the set.
    client.distinguished_name = name("client");
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];

    Ok((certificate, signed(server, &issuer)?, signed(client, &issuer)?))
}

fn name(unit: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "mongo-testkit");
    name.push(DnType::OrganizationalUnitName, unit);
    name.push(DnType::CommonName, format!("testkit {unit}"));
    name
}

fn signed(mut params: CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Result<String, rcgen::Error> {
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    Ok(params.signed_by(&key, issuer)?.pem() + &key.serialize_pem())
}
