//! Checks a connection string part by part, so that an error can name the part and need not quote the rest.

use crate::error::{Error, Result};

/// Checks the form of a connection string without connecting or resolving anything.
///
/// The rules are those of MongoDB's connection string and URI options specifications. An option that the
/// specifications do not know is an error here, because a misspelled `w=majorty` or `replicaset_=` is otherwise silently ignored.
///
/// ```
/// let error = mongo_core::validate_uri("mongodb://app:s3cret@db:99999/").unwrap_err();
/// assert_eq!(error.to_string(), "connection string: the port of host 1 is not a number from 1 to 65535");
/// ```
///
/// # Errors
/// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) naming the offending part; neither user name, password
/// nor option values are repeated.
pub fn validate_uri(uri: &str) -> Result<()> {
    let (scheme, rest) =
        uri.split_once("://").ok_or_else(|| wrong("it has no scheme: begin with mongodb:// or mongodb+srv://"))?;
    let srv = match scheme {
        "mongodb" => false,
        "mongodb+srv" => true,
        _ => return Err(wrong("the scheme is neither mongodb nor mongodb+srv")),
    };
    // A password that was not percent-encoded may hold `/`, `?`, `#` or `@`: then the authority is cut short, and the last
    // `@` of the whole string tells that something before it was meant as credentials.
    let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(authority_end);
    if !authority.contains('@') && tail.split('?').next().is_some_and(|path| path.contains('@')) {
        return Err(unescaped());
    }
    let hosts = match authority.rsplit_once('@') {
        Some((user_info, hosts)) => {
            check_user_info(user_info)?;
            hosts
        }
        None => authority,
    };
    check_hosts(hosts, srv)?;
    let (path, query) = match tail.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (tail, None),
    };
    check_database(path.strip_prefix('/').unwrap_or(path))?;
    query.map_or(Ok(()), check_options)
}

fn check_user_info(user_info: &str) -> Result<()> {
    if user_info.contains('@') {
        return Err(unescaped());
    }
    let (username, password) = match user_info.split_once(':') {
        Some((username, password)) => (username, Some(password)),
        None => (user_info, None),
    };
    if username.is_empty() {
        return Err(wrong("the user name before @ is empty"));
    }
    for (part, text) in [("user name", Some(username)), ("password", password)] {
        let Some(text) = text else { continue };
        if text.contains([':', '/', '?', '#', '[', ']', '@', ' ']) {
            return Err(unescaped());
        }
        if !is_percent_encoded(text) {
            return Err(wrong(format!("the {part} holds a % that is not followed by two hexadecimal digits: write %25 for %")));
        }
    }
    Ok(())
}

fn unescaped() -> Error {
    wrong("the user name or the password holds a character that must be percent-encoded (one of : / ? # [ ] @ or a space)")
}

fn check_hosts(hosts: &str, srv: bool) -> Result<()> {
    if hosts.is_empty() {
        return Err(wrong("it names no host"));
    }
    let mut count = 0;
    for (position, host) in hosts.split(',').enumerate() {
        let position = position + 1;
        count = position;
        if host.is_empty() {
            return Err(wrong(format!("host {position} is empty: look for a stray comma")));
        }
        if host.to_ascii_lowercase().ends_with(".sock") {
            continue;
        }
        let (name, port) = match host.strip_prefix('[') {
            Some(rest) => {
                let (address, after) =
                    rest.split_once(']').ok_or_else(|| wrong(format!("host {position} opens a [ that is never closed")))?;
                match after.strip_prefix(':') {
                    Some(port) => (address, Some(port)),
                    None if after.is_empty() => (address, None),
                    None => return Err(wrong(format!("host {position} has text behind its ]"))),
                }
            }
            None => match host.rsplit_once(':') {
                Some((name, _)) if name.contains(':') => {
                    return Err(wrong(format!("host {position} has more than one colon: write an IPv6 address in [ ]")));
                }
                Some((name, port)) => (name, Some(port)),
                None => (host, None),
            },
        };
        if name.is_empty() {
            return Err(wrong(format!("host {position} has no name")));
        }
        if name.chars().any(|c| c.is_whitespace() || matches!(c, '<' | '>' | '"' | '\\' | '{' | '}')) {
            return Err(wrong(format!("host {position} holds a character that no host name has")));
        }
        match port {
            Some(_) if srv => return Err(wrong("a mongodb+srv string takes no port")),
            Some(port) if port.parse::<u16>().map_or(true, |port| port == 0) => {
                return Err(wrong(format!("the port of host {position} is not a number from 1 to 65535")));
            }
            _ => {}
        }
    }
    if srv && count != 1 {
        return Err(wrong("a mongodb+srv string takes exactly one host"));
    }
    Ok(())
}

fn check_database(name: &str) -> Result<()> {
    if name.contains('/') {
        return Err(wrong("there is more than one / behind the hosts: percent-encode the one in the database name"));
    }
    if !is_percent_encoded(name) {
        return Err(wrong("the database name holds a % that is not followed by two hexadecimal digits"));
    }
    if name.contains(['\\', '"', ' ', '$', '.']) {
        return Err(wrong("the database name holds a character that no database name has"));
    }
    Ok(())
}

fn check_options(query: &str) -> Result<()> {
    let mut seen: Vec<String> = Vec::new();
    for option in query.split('&') {
        if option.is_empty() {
            if query.is_empty() {
                return Ok(());
            }
            return Err(wrong("an option is empty: look for a doubled or trailing &"));
        }
        let Some((name, value)) = option.split_once('=') else {
            return Err(wrong(format!("the option {} has no value", nameable(option))));
        };
        let lower = name.to_ascii_lowercase();
        let Some((_, form)) = OPTIONS.iter().find(|(known, _)| *known == lower) else {
            return Err(wrong(match nearest(&lower) {
                Some(known) => format!("there is no option {}: did you mean {known}?", nameable(name)),
                None => format!("there is no option {}", nameable(name)),
            }));
        };
        if !matches!(form, Form::Tags) && seen.contains(&lower) {
            return Err(wrong(format!("the option {name} is given twice")));
        }
        if value.is_empty() && !matches!(form, Form::Tags) {
            return Err(wrong(format!("the option {name} has an empty value")));
        }
        let wanted = match form {
            Form::Switch if !matches!(value, "true" | "false") => "true or false",
            Form::Whole if value.parse::<u64>().is_err() => "a whole number",
            Form::OneOf(values) if !values.iter().any(|known| known.eq_ignore_ascii_case(value)) => {
                return Err(wrong(format!("the option {name} is not one of {}", values.join(", "))));
            }
            _ if !is_percent_encoded(value) => "percent-encoded: write %25 for %",
            _ => {
                seen.push(lower);
                continue;
            }
        };
        return Err(wrong(format!("the option {name} must be {wanted}")));
    }
    Ok(())
}

/// An unknown option may be the tail of a password with an `&` in it: repeat it only if it looks like a name.
fn nameable(name: &str) -> String {
    if name.len() <= 40 && name.chars().all(|c| c.is_ascii_alphabetic() || c == '_') {
        name.to_owned()
    } else {
        "that is written there".to_owned()
    }
}

fn nearest(name: &str) -> Option<&'static str> {
    OPTIONS
        .iter()
        .map(|(known, _)| (*known, distance(known, name)))
        .filter(|(_, d)| *d <= 2)
        .min_by_key(|(_, d)| *d)
        .map(|(known, _)| known)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn is_percent_encoded(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.iter().enumerate().all(|(position, byte)| {
        *byte != b'%' || bytes.get(position + 1..position + 3).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

fn wrong(what: impl std::fmt::Display) -> Error {
    Error::invalid(format!("connection string: {what}"))
}

enum Form {
    Switch,
    Whole,
    Text,
    Tags,
    OneOf(&'static [&'static str]),
}

/// Every option of the URI options specification and of the drivers' manual, in lower case.
const OPTIONS: &[(&str, Form)] = &[
    ("appname", Form::Text),
    ("authmechanism", Form::Text),
    ("authmechanismproperties", Form::Text),
    ("authsource", Form::Text),
    ("compressors", Form::Text),
    ("connecttimeoutms", Form::Whole),
    ("directconnection", Form::Switch),
    ("enableoverloadretargeting", Form::Switch),
    ("heartbeatfrequencyms", Form::Whole),
    ("journal", Form::Switch),
    ("loadbalanced", Form::Switch),
    ("localthresholdms", Form::Whole),
    ("maxadaptiveretries", Form::Whole),
    ("maxconnecting", Form::Whole),
    ("maxidletimems", Form::Whole),
    ("maxpoolsize", Form::Whole),
    ("maxstalenessseconds", Form::Text),
    ("minpoolsize", Form::Whole),
    ("proxyhost", Form::Text),
    ("proxypassword", Form::Text),
    ("proxyport", Form::Whole),
    ("proxyusername", Form::Text),
    ("readconcernlevel", Form::OneOf(&["local", "majority", "linearizable", "available", "snapshot"])),
    ("readpreference", Form::OneOf(&["primary", "primaryPreferred", "secondary", "secondaryPreferred", "nearest"])),
    ("readpreferencetags", Form::Tags),
    ("replicaset", Form::Text),
    ("retryreads", Form::Switch),
    ("retrywrites", Form::Switch),
    ("safe", Form::Switch),
    ("servermonitoringmode", Form::OneOf(&["auto", "poll", "stream"])),
    ("serverselectiontimeoutms", Form::Whole),
    ("serverselectiontryonce", Form::Switch),
    ("sockettimeoutms", Form::Whole),
    ("srvmaxhosts", Form::Whole),
    ("srvservicename", Form::Text),
    ("ssl", Form::Switch),
    ("timeoutms", Form::Whole),
    ("tls", Form::Switch),
    ("tlsallowinvalidcertificates", Form::Switch),
    ("tlsallowinvalidhostnames", Form::Switch),
    ("tlscafile", Form::Text),
    ("tlscertificatekeyfile", Form::Text),
    ("tlscertificatekeyfilepassword", Form::Text),
    ("tlsdisablecertificaterevocationcheck", Form::Switch),
    ("tlsdisableocspendpointcheck", Form::Switch),
    ("tlsinsecure", Form::Switch),
    ("uuidrepresentation", Form::Text),
    ("w", Form::Text),
    ("waitqueuemultiple", Form::Whole),
    ("waitqueuetimeoutms", Form::Whole),
    ("wtimeoutms", Form::Whole),
    ("zlibcompressionlevel", Form::Text),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn good_strings_pass() {
        for uri in [
            "mongodb://localhost",
            "mongodb://localhost/",
            "mongodb://localhost:27017/db?replicaSet=rs0&w=majority",
            "mongodb://a:1,b:2,c/?directConnection=false",
            "mongodb://user:p%40ss@h/db",
            "mongodb://[::1]:27017/",
            "mongodb+srv://cluster.example/db?retryWrites=true",
            "mongodb://h/?readPreferenceTags=dc:ny&readPreferenceTags=",
            "mongodb://%2Ftmp%2Fmongodb-27017.sock/",
            "mongodb://h?tls=true",
        ] {
            validate_uri(uri).unwrap_or_else(|error| panic!("{uri}: {error}"));
        }
    }

    #[test]
    fn the_offending_part_is_named() {
        let cases: Vec<String> = [
            "localhost:27017",
            "http://localhost",
            "mongodb://",
            "mongodb://a,,b/",
            "mongodb://h:port/",
            "mongodb://h:0/",
            "mongodb://::1/",
            "mongodb://[::1/",
            "mongodb://user:pa ss@h/",
            "mongodb://user:pa/ss@h/",
            "mongodb://user:pa%ss@h/",
            "mongodb://:x@h/",
            "mongodb://h/a/b",
            "mongodb://h/a.b",
            "mongodb://h/?replicaSet",
            "mongodb://h/?replicaset_=x",
            "mongodb://h/?w=1&w=2",
            "mongodb://h/?tls=yes",
            "mongodb://h/?maxPoolSize=many",
            "mongodb://h/?readPreference=fastest",
            "mongodb://h/?tls=true&",
            "mongodb+srv://h:1/",
            "mongodb+srv://a,b/",
        ]
        .iter()
        .map(|uri| format!("{uri} -> {}", validate_uri(uri).unwrap_err()))
        .collect();
        insta::assert_snapshot!(cases.join("\n"));
    }

    proptest! {
        #[test]
        fn no_input_panics_or_is_quoted_back(user in "[ -~]{0,12}", password in "[!-~]{8,16}", tail in "[ -~]{0,20}") {
            if let Err(error) = validate_uri(&format!("mongodb://{user}:{password}@h{tail}")) {
                prop_assert!(!error.report().contains(&password), "{error}");
            }
        }

        #[test]
        fn random_text_never_panics(text in ".{0,60}") {
            let _ = validate_uri(&text);
        }
    }
}
