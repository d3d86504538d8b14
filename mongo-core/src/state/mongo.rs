//! States in a collection.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use mongodb::{
    bson::{self, Binary, Bson, DateTime, Document, doc, spec::BinarySubtype},
    options::{Acknowledgment, ReadConcern, WriteConcern},
};

use super::{StateName, StateStore, check_size};
use crate::{
    connect::{Deployment, Topology},
    error::{Error, Result},
    namespace::Namespace,
};

/// Keeps each state in a document `{_id: name, state, savedAt}` of a collection.
///
/// Written with majority and journal, which are waited for a minute at most, read with majority. Needs `find`, `insert`, `update` and `remove` on the collection.
#[derive(Clone)]
pub struct MongoState {
    deployment: Deployment,
    namespace: Namespace,
}

impl MongoState {
    /// States in the collection `namespace` of `deployment`, which the first save makes.
    pub fn new(deployment: &Deployment, namespace: Namespace) -> Self {
        Self { deployment: deployment.clone(), namespace }
    }

    async fn run(&self, mut command: Document) -> Result<Document> {
        let reads = command.contains_key("find");
        // A standalone knows no majority.
        if reads && *self.deployment.topology() != Topology::Standalone {
            command.insert("readConcern", bson::serialize_to_document(&ReadConcern::majority())?);
        }
        if !reads {
            let concern = WriteConcern::builder().w(Acknowledgment::Majority).journal(true).w_timeout(PATIENCE).build();
            command.insert("writeConcern", bson::serialize_to_document(&concern)?);
        }
        let reply = self.deployment.database(self.namespace.database()).run_command(command).await;
        let failed = |error: Error| error.with_context("state in", &self.namespace);
        let reply = reply.map_err(|error| failed(error.into()))?;
        // Refusals and unsatisfied write concerns come in a reply that says ok.
        let trouble = reply.get_array("writeErrors").ok().and_then(|errors| errors.first()?.as_document());
        if let Some(trouble) = trouble.or_else(|| reply.get_document("writeConcernError").ok()) {
            let code = crate::connect::error_code(trouble);
            return Err(failed(
                Error::new(crate::error::classify_code(code), "a state was not saved").with_context("code", code),
            ));
        }
        Ok(reply)
    }
}

impl fmt::Debug for MongoState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoState").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// A majority that does not come within this time is an error, not a reason to wait for ever.
const PATIENCE: Duration = Duration::from_secs(60);

#[async_trait]
impl StateStore for MongoState {
    fn describe(&self) -> String {
        format!("collection {}", self.namespace)
    }

    async fn load(&self, name: &StateName) -> Result<Option<Vec<u8>>> {
        let find =
            doc! { "find": self.namespace.collection(), "filter": { "_id": name.as_str() }, "limit": 1, "singleBatch": true };
        let reply = self.run(find).await?;
        let malformed = || Error::corrupt("a state is not what was saved").with_context("state in", &self.namespace);
        let cursor = reply.get_document("cursor").map_err(|error| malformed().with_source(error))?;
        let found = cursor.get_array("firstBatch").map_err(|error| malformed().with_source(error))?;
        let Some(found) = found.first() else { return Ok(None) };
        match found.as_document().and_then(|found| found.get("state")) {
            Some(Bson::Binary(state)) => Ok(Some(state.bytes.clone())),
            _ => Err(malformed().with_context("name", name)),
        }
    }

    async fn save(&self, name: &StateName, state: Vec<u8>) -> Result<()> {
        check_size(name, &state)?;
        let state = Binary { subtype: BinarySubtype::Generic, bytes: state };
        let update = doc! { "q": { "_id": name.as_str() }, "u": { "state": state, "savedAt": DateTime::now() }, "upsert": true };
        self.run(doc! { "update": self.namespace.collection(), "updates": [update] }).await.map(drop)
    }

    async fn remove(&self, name: &StateName) -> Result<()> {
        let delete = doc! { "q": { "_id": name.as_str() }, "limit": 1 };
        self.run(doc! { "delete": self.namespace.collection(), "deletes": [delete] }).await.map(drop)
    }
}
