//! What is read of a request to know what it asks for.

use bson::{RawBsonRef, RawDocument};

use super::Malformed;

/// A command, as far as it is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Command<'a> {
    /// Its first key: a server goes by that, and by no other.
    pub(crate) name: &'a str,
    pub(crate) database: &'a str,
    body: &'a RawDocument,
}

impl<'a> Command<'a> {
    /// Reads the body of a message that was checked. `database` for what does not say it itself, as legacy queries.
    pub(crate) fn read(body: &'a [u8], database: Option<&'a str>) -> Result<Self, Malformed> {
        let body = RawDocument::from_bytes(body).map_err(|_| Malformed::Bson)?;
        let (name, _) = body.iter().next().ok_or(Malformed::Bson)?.map_err(|_| Malformed::Bson)?;
        let database = match database {
            Some(database) => database,
            None => body.get_str("$db").map_err(|_| Malformed::Bson)?,
        };
        Ok(Self { name: name.as_str(), database, body })
    }

    /// Whether it asks for the state of the server, by which a connection begins.
    pub(crate) fn is_hello(&self) -> bool {
        // The old name is taken in any case that drivers have ever sent it in.
        matches!(self.name, "hello" | "isMaster" | "ismaster")
    }

    /// The collection that it is about, where its first value is a name.
    pub(crate) fn collection(&self) -> Option<&'a str> {
        match self.body.iter().next()?.ok()? {
            (_, RawBsonRef::String(name)) => Some(name),
            _ => None,
        }
    }
}
