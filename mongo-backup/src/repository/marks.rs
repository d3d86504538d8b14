//! Marks: small objects by which operations on a repository tell one another what they are about.

use mongo_core::{Error, ErrorKind, Result, bson};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Repository,
    envelope::{self, Magic},
};
use crate::archive::{ObjectName, PutMode, PutOutcome};

impl Repository {
    pub(super) async fn put_mark(&self, name: &ObjectName, mark: &(impl Serialize + Sync), mode: PutMode) -> Result<PutOutcome> {
        let object = envelope::seal(Magic::MARK, Some(name), self.config().cipher.as_ref(), &bson::serialize_to_vec(mark)?)?;
        self.archive().put(name, object, mode).await
    }

    pub(super) async fn read_mark<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>> {
        let object = match self.archive().get(name, None).await {
            Ok(object) => object,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let payload = envelope::open(Magic::MARK, name, self.config().cipher.as_ref(), &object)?;
        let malformed = |error| Error::corrupt("a mark is malformed").with_context("object", name).with_source(error);
        bson::deserialize_from_slice(&payload).map(Some).map_err(malformed)
    }
}
