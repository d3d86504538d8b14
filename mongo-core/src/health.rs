//! Is the deployment well, and can it serve?

use std::time::Duration;

use mongodb::bson::{Document, doc};
use tokio::time::Instant;

use crate::{
    connect::{Deployment, Topology},
    error::{Error, ErrorKind, Result},
};

/// The answer of [`Deployment::health`].
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Health {
    /// The overall verdict.
    pub status: HealthStatus,
    /// How long a ping took, where one came back.
    pub latency: Option<Duration>,
    /// What kind of deployment it is.
    pub topology: Topology,
    /// The primary's `host:port`, where there is one.
    pub primary: Option<String>,
    /// Members that the answering server knows; empty for a standalone.
    pub members: Vec<String>,
    /// Why it is not healthy, one line each.
    pub reasons: Vec<String>,
}

/// The verdict of a health check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum HealthStatus {
    /// Answers, and can be written to.
    Healthy,
    /// Answers, but there is no primary: reads from secondaries only.
    ReadOnly,
    /// Does not answer.
    Down,
}

impl Deployment {
    /// Pings the nearest server and asks it for the primary, within `timeout`.
    ///
    /// A deployment that does not answer is an answer ([`HealthStatus::Down`]), not an error. Needs no privilege.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect on the deployment.
    pub async fn health(&self, timeout: Duration) -> Health {
        let mut health = Health {
            status: HealthStatus::Down,
            latency: None,
            topology: self.topology().clone(),
            primary: None,
            members: Vec::new(),
            reasons: Vec::new(),
        };
        let started = Instant::now();
        let hello = match tokio::time::timeout(timeout, self.nearest_hello()).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(error)) => {
                health.reasons.push(error.report());
                return health;
            }
            Err(_) => {
                health.reasons.push(format!("no answer within {timeout:?}"));
                return health;
            }
        };
        health.latency = Some(started.elapsed());
        let names = |key: &str| -> Vec<String> {
            hello.get_array(key).into_iter().flatten().filter_map(|host| host.as_str().map(str::to_owned)).collect()
        };
        health.members = [names("hosts"), names("passives"), names("arbiters")].concat();
        health.primary = match self.topology() {
            Topology::ReplicaSet(_) => hello.get_str("primary").ok().map(str::to_owned),
            _ => hello.get_str("me").ok().map(str::to_owned).or_else(|| self.hosts().first().map(ToString::to_string)),
        };
        let writable = hello.get_bool("isWritablePrimary").unwrap_or(false);
        health.status = if writable || health.primary.is_some() {
            HealthStatus::Healthy
        } else {
            health.reasons.push("the replica set has no primary".to_owned());
            HealthStatus::ReadOnly
        };
        health
    }

    /// Succeeds when the deployment can be written to now.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] with the reasons of [`health`](Self::health).
    pub async fn ready(&self, timeout: Duration) -> Result<Health> {
        let health = self.health(timeout).await;
        match health.status {
            HealthStatus::Healthy => Ok(health),
            _ => Err(Error::new(ErrorKind::Unavailable, format!("not ready: {}", health.reasons.join("; ")))),
        }
    }

    async fn nearest_hello(&self) -> Result<Document> {
        use mongodb::options::{ReadPreference, SelectionCriteria};
        let nearest = SelectionCriteria::ReadPreference(ReadPreference::Nearest { options: None });
        let admin = self.client().database("admin");
        Ok(admin.run_command(doc! { "hello": 1 }).selection_criteria(nearest).await?)
    }
}
