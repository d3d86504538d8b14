#![doc = include_str!("../README.md")]

#[cfg(feature = "http")]
mod admin;
mod command;
mod connections;
mod handle;
mod hello;
mod instruments;
mod members;
mod peer;
mod proxy;
mod requests;
mod rules;
mod session;
mod settings;
mod stream;
#[cfg(test)]
mod tests;
#[cfg(feature = "tls")]
mod tls;
mod wire;

#[cfg(feature = "http")]
pub use admin::router;
pub use connections::ConnectionStatus;
pub use handle::{ProxyHandle, RuleStatus, RulesStatus, Statistics};
pub use proxy::Proxy;
pub use requests::{LoggedRequest, RequestLog};
pub use rules::{Access, Action, ConcurrencyRule, Denial, Key, Match, RateRule, Rule, Rules};
pub use settings::{ProxySettings, Topology};
#[cfg(feature = "tls")]
pub use tls::{ListenTls, UpstreamTls};

/// For the fuzz targets: a message as it comes from a client, in two pieces.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    use std::{ops::Range, time::Duration};

    use crate::{
        command::{Command, touched::Touched},
        hello::Hello,
        wire::{
            compression,
            header::{HEADER, Header, Opcode},
            query, rewrite,
            scan::Scan,
        },
    };

    /// Reads a message, or refuses it.
    pub fn message(bytes: &[u8], cut: usize) {
        let Some(Ok(header)) = bytes.first_chunk::<HEADER>().map(Header::read) else { return };
        match header.opcode {
            Opcode::Message => scan(header, &bytes[HEADER..], cut),
            Opcode::Compressed => {
                if let Ok((inner, message)) = compression::inflate(header, &bytes[HEADER..]) {
                    assert_eq!(message.len(), inner.length);
                    scan(inner, &message[HEADER..], cut);
                }
            }
            Opcode::Query => {
                if let Ok(body) = query::check(bytes) {
                    let _ = Command::read(&bytes[body], Some("admin"));
                }
            }
            Opcode::Reply => {}
        }
    }

    fn scan(header: Header, rest: &[u8], cut: usize) {
        let rest = &rest[..rest.len().min(header.length - HEADER)];
        let cut = cut.min(rest.len());
        let mut pieces = Scan::new(header);
        let there = pieces.advance(&rest[..cut]).and_then(|checked| pieces.advance(&rest[checked..]));
        let mut whole = Scan::new(header);
        let at_once = whole.advance(rest);
        assert_eq!(there.is_ok(), at_once.is_ok());
        assert_eq!(pieces.is_complete(), whole.is_complete());
        if let (true, Some(body)) = (whole.is_complete(), whole.body()) {
            let mut message = Vec::new();
            header.write(&mut message);
            message.extend_from_slice(rest);
            judge(header, &message, body, whole.sequence("nsInfo").unwrap_or_default());
        }
    }

    /// What is known of a command, and the message with another body, which is one as well.
    fn judge(header: Header, message: &[u8], body: Range<usize>, of_bulk_write: Range<usize>) {
        let Ok(command) = Command::read(&message[body.clone()], None) else { return };
        let _ = (command.access(), command.explained(), command.continues(), command.may_leave(), Hello::read(&command));
        let _ = Touched::by(&command, &message[of_bulk_write]);
        let Ok(changed) = rewrite::command(command.body(), Some(Duration::from_secs(1)), Some("by the proxy")) else { return };
        let (mut passed, checksum) = rewrite::head(message, header, body.clone(), &changed);
        passed.extend_from_slice(&message[body.end..message.len() - checksum]);
        let header = passed.first_chunk().map(Header::read);
        let Some(Ok(header)) = header else { panic!("a changed message has no header: {header:?}") };
        let mut scan = Scan::new(header);
        assert_eq!(scan.advance(&passed[HEADER..]), Ok(passed.len() - HEADER));
        assert!(scan.is_complete());
    }
}
