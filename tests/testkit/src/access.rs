//! How a client gets in: credentials, TLS, and the connection string that says both.

use std::path::Path;

use mongo_core::mongodb::{Client, options::ClientOptions};

use crate::{Error, Result, tls::Tls};

/// What a connection string of one deployment carries besides its hosts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Access {
    pub(crate) login: Login,
    pub(crate) tls: Option<Tls>,
    /// Set for members of a set; `None` for a standalone.
    pub(crate) replica_set: Option<String>,
}

/// Whether clients log in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Login {
    #[default]
    No,
    Root,
}

/// What a client is to know of a deployment.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reach {
    /// All of it.
    Deployment,
    /// The one server that it names.
    Member,
}

impl Access {
    /// The connection string for `hosts`, which are `host:port` and in need of no escape.
    pub(crate) fn uri(&self, hosts: &[String], reach: Reach) -> String {
        let mut options = Vec::new();
        match (&self.replica_set, reach) {
            (Some(name), Reach::Deployment) => options.push(format!("replicaSet={name}")),
            _ => options.push("directConnection=true".to_owned()),
        }
        let login = match self.login {
            Login::No => String::new(),
            Login::Root => {
                options.push("authSource=admin".to_owned());
                format!("{}:{}@", escape(USER), escape(PASSWORD))
            }
        };
        if let Some(tls) = &self.tls {
            options.push(format!("tls=true&tlsCAFile={}", escape_path(&tls.ca)));
        }
        format!("mongodb://{login}{}/?{}", hosts.join(","), options.join("&"))
    }

    /// The same way in, before there is a user.
    pub(crate) fn anonymous(&self) -> Self {
        Self { login: Login::No, ..self.clone() }
    }
}

/// The options of `uri`, as the driver reads them.
pub(crate) async fn client_options(uri: &str) -> Result<ClientOptions> {
    ClientOptions::parse(uri).await.map_err(Error::command("reading the connection string"))
}

/// A client of `uri` in the caller's runtime.
pub(crate) async fn client(uri: &str) -> Result<Client> {
    Client::with_options(client_options(uri).await?).map_err(Error::command("making a client"))
}

fn escape_path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

/// Percent-encodes everything but what no reader of connection strings can mistake.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// The user of a deployment with authentication.
pub(crate) const USER: &str = "root";
/// Its password, which goes through every escape that a connection string needs.
pub(crate) const PASSWORD: &str = "p@ss:w/rd?#[50%]&ü";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_string_says_what_a_client_needs() {
        let hosts = ["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()];
        let standalone = Access::default();
        assert_eq!(standalone.uri(&hosts[..1], Reach::Deployment), "mongodb://127.0.0.1:1/?directConnection=true");

        let ca = "/tmp/a b/ca.pem".into();
        let set = Access {
            login: Login::Root,
            tls: Some(Tls { ca, server: "".into(), client: "".into() }),
            replica_set: Some("rs1".to_owned()),
        };
        assert_eq!(
            set.uri(&hosts, Reach::Deployment),
            "mongodb://root:p%40ss%3Aw%2Frd%3F%23%5B50%25%5D%26%C3%BC@127.0.0.1:1,127.0.0.1:2/\
             ?replicaSet=rs1&authSource=admin&tls=true&tlsCAFile=%2Ftmp%2Fa%20b%2Fca.pem"
        );
        assert_eq!(
            set.anonymous().uri(&hosts[1..], Reach::Member),
            "mongodb://127.0.0.1:2/?directConnection=true&tls=true&tlsCAFile=%2Ftmp%2Fa%20b%2Fca.pem"
        );
    }
}
