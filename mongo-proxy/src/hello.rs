//! The handshake: what is looked at in it, and what is changed.
//!
//! The server's own answer is passed on, whatever is in it; only addresses are put in the place of others, and what a client that was told to look for a load
//! balancer has to find is added.

use bson::{RawArrayBuf, RawBsonRef, RawDocument, RawDocumentBuf, cstr};

use crate::{
    command::Command,
    members::Members,
    wire::{Malformed, rewrite},
};

/// What a client says of itself in its hello.
#[derive(Debug)]
pub(crate) struct Hello<'a> {
    /// Whether it was told that it connects to a load balancer (`loadBalanced=true`).
    pub(crate) is_load_balanced: bool,
    /// Whether it begins to log in with it.
    pub(crate) logs_in: bool,
    /// The name of its application.
    pub(crate) application: Option<&'a str>,
    with_certificate: bool,
}

impl<'a> Hello<'a> {
    pub(crate) fn read(command: &Command<'a>) -> Self {
        let body = command.body();
        let document = |from: &'a RawDocument, key: &str| from.get_document(key).ok();
        let client = document(body, "client").and_then(|client| document(client, "application"));
        let login = body.get("speculativeAuthenticate");
        Self {
            is_load_balanced: matches!(body.get("loadBalanced"), Ok(Some(RawBsonRef::Boolean(true)))),
            logs_in: !matches!(login, Ok(None)),
            // A server refuses who has a longer one.
            application: client
                .and_then(|application| application.get_str("name").ok())
                .filter(|name| name.len() <= LONGEST_APPLICATION),
            with_certificate: match login {
                Ok(Some(RawBsonRef::Document(login))) => shows_certificate(login),
                Ok(None) => false,
                // Whatever the server makes of it.
                _ => true,
            },
        }
    }

    /// What must not reach the server. A server that has no port for balancers refuses who speaks of one; and who logs in with "the certificate of this
    /// connection" would be taken for the proxy, whose certificate that is.
    pub(crate) fn without(&self, proxy_shows_certificate: bool) -> Vec<&'static str> {
        let fields = [
            (self.is_load_balanced, "loadBalanced"),
            (self.with_certificate && proxy_shows_certificate, "speculativeAuthenticate"),
        ];
        fields.into_iter().filter_map(|(is, field)| is.then_some(field)).collect()
    }
}

/// Whether somebody logs in with the certificate of the connection, or with what cannot be read.
pub(crate) fn shows_certificate(login: &RawDocument) -> bool {
    login.iter_elements().any(|field| match field {
        Ok(field) if field.key().as_str() == "mechanism" => field
            .value()
            .map_or(true, |mechanism| mechanism.as_str().is_none_or(|name| name.eq_ignore_ascii_case("MONGODB-X509"))),
        Ok(_) => false,
        Err(_) => true,
    })
}

/// The answer as the client is to see it.
pub(crate) fn answer(
    answer: &RawDocument,
    members: Option<&Members>,
    to_load_balanced: bool,
) -> Result<RawDocumentBuf, Malformed> {
    let (mut without, mut with) = (Vec::new(), RawDocumentBuf::new());
    if let Some(members) = members {
        for (key, name) in [("hosts", cstr!("hosts")), ("passives", cstr!("passives")), ("arbiters", cstr!("arbiters"))] {
            let Ok(Some(RawBsonRef::Array(hosts))) = answer.get(key) else { continue };
            let hosts = hosts.into_iter().filter_map(|host| members.shown(host.ok()?.as_str()?));
            with.append(name, hosts.collect::<RawArrayBuf>());
            without.push(key);
        }
        for (key, name) in [("primary", cstr!("primary")), ("me", cstr!("me"))] {
            let Ok(Some(RawBsonRef::String(host))) = answer.get(key) else { continue };
            if let Some(shown) = members.shown(host) {
                with.append(name, shown);
            }
            without.push(key);
        }
    }
    if to_load_balanced {
        // One and the same behind every proxy as long as the server runs, which is what drivers want to know.
        let process = answer.get_document("topologyVersion").and_then(|version| version.get_object_id("processId"));
        with.append(cstr!("serviceId"), process.map_err(|_| Malformed::Bson)?);
    }
    rewrite::document(answer, &without, &with)
}

const LONGEST_APPLICATION: usize = 128;
