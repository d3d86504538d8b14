//! Keeping credentials out of everything that is printed.

use std::fmt;

/// A value that must not be printed: `Debug` and `Display` show `[redacted]`.
///
/// ```
/// use mongo_core::Secret;
///
/// let password = Secret::new("hunter2".to_owned());
/// assert_eq!(format!("{password:?} {password}"), "[redacted] [redacted]");
/// assert_eq!(password.expose(), "hunter2");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<T = String>(T);

impl<T> Secret<T> {
    /// Wraps a secret.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The secret itself: do not log it.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> From<T> for Secret<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl From<&str> for Secret<String> {
    fn from(value: &str) -> Self {
        Self(value.to_owned())
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl<T> fmt::Display for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

/// Replaces the credentials of every `scheme://user:password@` in `text`, and the values of URI options that can
/// carry secrets, with `[redacted]`.
///
/// It is made for text that goes to people: it would rather hide too much than too little. What stands between
/// `://` and the last `@` before the end of the authority is hidden, so a password that was not percent-encoded
/// (a common mistake, and the reason that such a URI is in an error message at all) is hidden too.
///
/// ```
/// assert_eq!(
///     mongo_core::redact_uris("cannot parse mongodb://app:p@ss/w@db.example/shop"),
///     "cannot parse mongodb://[redacted]@db.example/shop",
/// );
/// ```
pub fn redact_uris(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(scheme_end) = rest.find("://") {
        let (head, tail) = rest.split_at(scheme_end + 3);
        out.push_str(head);
        // A URI ends at white space or a quote. A password may hold `/` or `?` unescaped, so look for the last `@`.
        let end = tail.find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`')).unwrap_or(tail.len());
        let (uri, after) = tail.split_at(end);
        match uri.rfind('@') {
            Some(at) => {
                out.push_str(HIDDEN);
                out.push_str(&redact_options(&uri[at..]));
            }
            None => out.push_str(&redact_options(uri)),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Hides the values of options that carry secrets, such as `authMechanismProperties=AWS_SESSION_TOKEN:…`.
fn redact_options(uri: &str) -> String {
    const SECRET_OPTIONS: [&str; 4] =
        ["authmechanismproperties", "tlscertificatekeyfilepassword", "proxypassword", "sslpemkeypassword"];
    let Some((head, query)) = uri.split_once('?') else { return uri.to_owned() };
    let options: Vec<String> = query
        .split('&')
        .map(|option| match option.split_once('=') {
            Some((name, _)) if SECRET_OPTIONS.contains(&name.to_ascii_lowercase().as_str()) => format!("{name}={HIDDEN}"),
            _ => option.to_owned(),
        })
        .collect();
    format!("{head}?{}", options.join("&"))
}

const HIDDEN: &str = "[redacted]";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn secret_options_are_hidden() {
        let shown = redact_uris("mongodb://h/?tlsCertificateKeyFilePassword=abc&tls=true");
        assert_eq!(shown, "mongodb://h/?tlsCertificateKeyFilePassword=[redacted]&tls=true");
    }

    proptest! {
        #[test]
        fn no_password_survives(password in "[a-zA-Z0-9:/?@%#]{6,20}", prefix in "[a-z ]{0,10}") {
            let text = format!("{prefix}mongodb://user:{password}@host:27017/db");
            let shown = redact_uris(&text);
            prop_assert!(!shown.contains(&password), "{shown}");
            prop_assert!(shown.contains("@host:27017/db"));
        }
    }
}
