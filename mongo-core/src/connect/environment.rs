//! The variables of [`ConnectOptions::from_env`].

use std::{str::FromStr, time::Duration};

use super::ConnectOptions;
use crate::error::{Error, Result};

pub(super) fn read(variable: impl Fn(&str) -> Option<String>) -> Result<ConnectOptions> {
    let text = |name: &str| variable(name).filter(|value| !value.is_empty());
    let mut options = match text("MONGO_URI") {
        Some(uri) => ConnectOptions::from_uri(uri).map_err(|error| error.with_context("variable", "MONGO_URI"))?,
        None => {
            let host = text("MONGO_HOST").unwrap_or_else(|| "localhost".to_owned());
            let port = number(text("MONGO_PORT"), "MONGO_PORT")?.unwrap_or(27017);
            ConnectOptions::from_host(&host, port).map_err(|error| error.with_context("variable", "MONGO_HOST"))?
        }
    };
    match (text("MONGO_USERNAME"), text("MONGO_PASSWORD")) {
        (Some(username), Some(password)) => options = options.with_credentials(username, password),
        (None, None) => {}
        (Some(_), None) => return Err(wrong("MONGO_PASSWORD", "is missing beside MONGO_USERNAME")),
        (None, Some(_)) => return Err(wrong("MONGO_USERNAME", "is missing beside MONGO_PASSWORD")),
    }
    options.auth_source = text("MONGO_AUTH_SOURCE");
    options.default_database = text("MONGO_DB");
    options.replica_set = text("MONGO_REPLICA_SET");
    options.tls = text("MONGO_USE_SSL").map(|value| switch(&value, "MONGO_USE_SSL")).transpose()?;
    options.ca_file = text("MONGO_SSL_CA_CERTS").map(Into::into);
    if options.tls == Some(false) && options.ca_file.is_some() {
        return Err(wrong("MONGO_USE_SSL", "is off, yet MONGO_SSL_CA_CERTS is set: remove one of them"));
    }
    if let Some(requirement) = text("MONGO_SSL_CERT_REQS") {
        options.certificates_optional = match requirement.to_ascii_lowercase().trim_start_matches("cert_") {
            "required" => false,
            // A client always gets a certificate from a TLS server, so "optional" can only mean "not verified".
            "optional" | "none" => true,
            _ => return Err(wrong("MONGO_SSL_CERT_REQS", "is not one of required, optional, none")),
        };
    }
    options.max_pool_size = number(text("MONGO_MAX_POOL_SIZE"), "MONGO_MAX_POOL_SIZE")?;
    options.min_pool_size = number(text("MONGO_MIN_POOL_SIZE"), "MONGO_MIN_POOL_SIZE")?;
    let millis = |name: &'static str| -> Result<Option<Duration>> { Ok(number(text(name), name)?.map(Duration::from_millis)) };
    options.max_idle_time = millis("MONGO_MAX_IDLE_TIME_MS")?;
    options.connect_timeout = millis("MONGO_CONNECT_TIMEOUT_MS")?;
    options.server_selection_timeout = millis("MONGO_SERVER_SELECTION_TIMEOUT_MS")?;
    Ok(options)
}

fn number<T: FromStr>(value: Option<String>, name: &'static str) -> Result<Option<T>> {
    value.map(|value| value.trim().parse().map_err(|_| wrong(name, "is not a whole number in range"))).transpose()
}

fn switch(value: &str, name: &'static str) -> Result<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(wrong(name, "is neither true nor false")),
    }
}

fn wrong(name: &'static str, what: &'static str) -> Error {
    Error::invalid(format!("the environment variable {name} {what}"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::error::ErrorKind;

    fn from(variables: &[(&str, &str)]) -> Result<ConnectOptions> {
        let variables: HashMap<_, _> = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        read(|name| variables.get(name).cloned())
    }

    #[tokio::test]
    async fn every_variable_arrives() {
        let options = from(&[
            ("MONGO_HOST", "db.example"),
            ("MONGO_PORT", "27018"),
            ("MONGO_DB", "shop"),
            ("MONGO_USERNAME", "app"),
            ("MONGO_PASSWORD", "p@ss:w/ord"),
            ("MONGO_AUTH_SOURCE", "users"),
            ("MONGO_REPLICA_SET", "rs0"),
            ("MONGO_USE_SSL", "true"),
            ("MONGO_SSL_CERT_REQS", "CERT_REQUIRED"),
            ("MONGO_MAX_POOL_SIZE", "50"),
            ("MONGO_MIN_POOL_SIZE", "2"),
            ("MONGO_MAX_IDLE_TIME_MS", "60000"),
            ("MONGO_CONNECT_TIMEOUT_MS", "1000"),
            ("MONGO_SERVER_SELECTION_TIMEOUT_MS", "2000"),
        ])
        .unwrap()
        .to_client_options()
        .await
        .unwrap();
        assert_eq!(options.hosts[0].to_string(), "db.example:27018");
        let credential = options.credential.unwrap();
        assert_eq!(credential.password.as_deref(), Some("p@ss:w/ord"));
        assert_eq!(credential.source.as_deref(), Some("users"));
        assert_eq!(options.repl_set_name.as_deref(), Some("rs0"));
        assert_eq!(options.default_database.as_deref(), Some("shop"));
        assert!(matches!(options.tls, Some(mongodb::options::Tls::Enabled(_))));
        assert_eq!((options.max_pool_size, options.min_pool_size), (Some(50), Some(2)));
        assert_eq!(options.max_idle_time, Some(Duration::from_secs(60)));
        assert_eq!(options.connect_timeout, Some(Duration::from_secs(1)));
        assert_eq!(options.server_selection_timeout, Some(Duration::from_secs(2)));
    }

    #[tokio::test]
    async fn certificates_are_not_left_unverified_by_the_environment_alone() {
        let options = from(&[("MONGO_USE_SSL", "1"), ("MONGO_SSL_CERT_REQS", "none")]).unwrap();
        assert_eq!(options.to_client_options().await.unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_wrong_variable_is_named() {
        for (variables, name) in [
            (vec![("MONGO_PORT", "http")], "MONGO_PORT"),
            (vec![("MONGO_PORT", "70000")], "MONGO_PORT"),
            (vec![("MONGO_USE_SSL", "maybe")], "MONGO_USE_SSL"),
            (vec![("MONGO_SSL_CERT_REQS", "x")], "MONGO_SSL_CERT_REQS"),
            (vec![("MONGO_USERNAME", "x")], "MONGO_PASSWORD"),
            (vec![("MONGO_URI", "mongodb://h:x/")], "MONGO_URI"),
            (vec![("MONGO_MAX_POOL_SIZE", "-1")], "MONGO_MAX_POOL_SIZE"),
        ] {
            let error = from(&variables).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
