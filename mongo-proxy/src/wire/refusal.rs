//! What a client is told that is not served, in words that its driver understands.

use std::{
    sync::atomic::{AtomicI32, Ordering::Relaxed},
    time::Duration,
};

use bson::{RawArrayBuf, RawDocumentBuf, rawdoc};

use super::{Malformed, header::Header, reply};
use crate::rules::{Denial, Refused};

/// To who sent what is no message, before its connection is closed. Without labels: it is of no use to send it again.
pub(crate) fn malformed(request: Header, why: Malformed) -> Vec<u8> {
    let (code, name) = match why {
        Malformed::Flags => (223, "IllegalOpMsgFlag"),
        Malformed::Section => (233, "TooManyDocumentSequences"),
        Malformed::Checksum => (288, "ChecksumMismatch"),
        Malformed::Bson | Malformed::Bounds => (22, "InvalidBSON"),
        Malformed::Depth => (15, "Overflow"),
        Malformed::Length | Malformed::Opcode | Malformed::Compression | Malformed::First => (17, "ProtocolError"),
    };
    to(request, &error(code, name, &format!("the proxy takes this for no message of MongoDB: {why}")))
}

/// To whose request was not passed on. That it was not is what makes it honest to say that it may be sent again.
pub(crate) fn refused(request: Header, why: &Refused) -> Vec<u8> {
    let by = |rule: &str, what: &str| format!("{what} (rule {rule:?} of the proxy)");
    let document = match why {
        Refused::Denied(Denial::Unauthorized, rule) => error(13, "Unauthorized", &by(rule, "this is not allowed")),
        Refused::Denied(Denial::QueryRejected, rule) => error(411, "QueryRejectedBySettings", &by(rule, "this is not allowed")),
        Refused::Denied(Denial::ReadOnly, rule) => error(371, "UserWritesBlocked", &by(rule, "nothing is written now")),
        Refused::Limited(after, rule) => {
            let mut document = error(462, "IngressRequestRateLimitExceeded", &by(rule, "there is too much of this"));
            let labels = ["SystemOverloadedError", "RetryableError"].into_iter().collect::<RawArrayBuf>();
            document.append(bson::cstr!("errorLabels"), labels);
            // Drivers wait for a random part of it, so that those who were refused together do not come together again.
            let after =
                after.map_or(USUAL_BACKOFF, |after| after.saturating_mul(2)).clamp(Duration::from_millis(1), LONGEST_BACKOFF);
            document.append(bson::cstr!("baseBackoffMS"), i32::try_from(after.as_millis()).unwrap_or(i32::MAX));
            document
        }
        // As a server says it. Whoever has no time left does not want it tried again.
        Refused::OutOfTime(rule) => error(50, "MaxTimeMSExpired", &by(rule, "operation exceeded time limit while it waited")),
        // Of all refusals this is the one by which a driver is to look for another server, and to drop its connections. Without a topologyVersion, so
        // that it takes it for news whatever it knows: that of the server would be the one it has already.
        Refused::Draining(label) => {
            let mut document = error(91, "ShutdownInProgress", "the proxy is about to stop");
            if let Some(label) = label {
                document.append(bson::cstr!("errorLabels"), [*label].into_iter().collect::<RawArrayBuf>());
            }
            document
        }
        Refused::Certificate => error(
            18,
            "AuthenticationFailed",
            "a certificate cannot be shown through the proxy: log in with a password, or connect to the server itself",
        ),
    };
    to(request, &document)
}

fn error(code: i32, name: &str, message: &str) -> RawDocumentBuf {
    rawdoc! { "ok": 0.0, "errmsg": message, "code": code, "codeName": name }
}

fn to(request: Header, document: &RawDocumentBuf) -> Vec<u8> {
    static NUMBER: AtomicI32 = AtomicI32::new(1);
    reply::to(request, NUMBER.fetch_add(1, Relaxed), document)
}

/// What drivers wait at first if they are told nothing.
const USUAL_BACKOFF: Duration = Duration::from_millis(100);
/// They wait no longer than this.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
