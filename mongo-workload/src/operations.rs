//! Operations that need nothing but to be submitted: find, aggregate and any command.

use std::time::Duration;

use mongo_core::{
    Error, ErrorKind, Result,
    bson::{Bson, Document, doc, oid::ObjectId},
    mongodb::{
        Client, Collection, Cursor, Database,
        action::Action as _,
        options::{AggregateOptions, FindOptions, SelectionCriteria},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    runtime::Handle,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    job::Job,
    manager::{Limits, Manager},
    route::member::{Whereabouts, only, whereabouts},
    submission::Submission,
};

/// Operations that keep to the [`Limits`] of their class by themselves.
///
/// Each is found on the server by its comment, which nothing else has. If its [`Job`] is cancelled or dropped, or its time is over, while a server or the members of a set are at work on it, it is
/// killed there; nobody needs a privilege to kill operations of its own. Behind a router it ends by its time limit. Results are in memory as a whole: limit them, and say with [`Submission::memory`] how much that may be.
impl Manager {
    /// Submits a find and collects what it finds. Of `options`, time and comment are those of the class, and so is the batch size where there is none.
    ///
    /// ```no_run
    /// use mongo_core::{bson::{Document, doc}, mongodb::{Collection, options::FindOptions}};
    /// use mongo_workload::{Manager, Submission};
    ///
    /// # async fn example(manager: Manager, orders: Collection<Document>) -> mongo_core::Result<()> {
    /// let newest = FindOptions::builder().sort(doc! { "_id": -1 }).limit(20).build();
    /// let job = manager.find(Submission::read("high").shape("newest orders"), &orders, doc! { "status": "open" }, newest);
    /// let found = job.outcome().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The outcome's: those of [`run`](Self::run) and of the server.
    pub fn find<T>(
        &self,
        submission: Submission,
        collection: &Collection<T>,
        filter: Document,
        options: FindOptions,
    ) -> Job<Vec<T>>
    where
        T: DeserializeOwned + Send + Sync + Unpin + 'static,
    {
        let collection = collection.clone();
        self.submit(submission, move |limits| {
            let (collection, filter, mut options) = (collection.clone(), filter.clone(), options.clone());
            async move {
                let on_server = OnServer::new(collection.client(), &limits);
                options.max_time = Some(limits.max_time);
                options.batch_size.get_or_insert(limits.batch_size);
                options.comment = Some(on_server.comment());
                let work = async { all_of(collection.find(filter).with_options(options).await?).await };
                on_server.ended(work.await)
            }
        })
    }

    /// Submits an aggregation and collects what it gives. Of `options`, time and comment are those of the class, and so is the batch size where there is none.
    ///
    /// One that writes, by `$out` or `$merge`, is submitted with [`Submission::write`].
    ///
    /// # Errors
    /// The outcome's: those of [`run`](Self::run) and of the server.
    pub fn aggregate<T>(
        &self,
        submission: Submission,
        collection: &Collection<T>,
        pipeline: Vec<Document>,
        options: AggregateOptions,
    ) -> Job<Vec<Document>>
    where
        T: Send + Sync + 'static,
    {
        let collection = collection.clone();
        self.submit(submission, move |limits| {
            let (collection, pipeline, mut options) = (collection.clone(), pipeline.clone(), options.clone());
            async move {
                let on_server = OnServer::new(collection.client(), &limits);
                options.max_time = Some(limits.max_time);
                options.batch_size.get_or_insert(limits.batch_size);
                options.comment = Some(on_server.comment());
                let work = async { all_of(collection.aggregate(pipeline).with_options(options).await?).await };
                on_server.ended(work.await)
            }
        })
    }

    /// Submits a command and gives its reply. `maxTimeMS` and `comment` are those of the class, also where the command has others; the members are those that `from` says, or else the
    /// primary.
    ///
    /// # Errors
    /// The outcome's: those of [`run`](Self::run) and of the server.
    pub fn command(
        &self,
        submission: Submission,
        database: &Database,
        command: Document,
        from: Option<SelectionCriteria>,
    ) -> Job<Document> {
        let database = database.clone();
        self.submit(submission, move |limits| {
            let (database, mut command, from) = (database.clone(), command.clone(), from.clone());
            async move {
                let on_server = OnServer::new(database.client(), &limits);
                command.insert(
                    "maxTimeMS",
                    i64::try_from(limits.max_time.as_millis()).unwrap_or(i64::MAX).clamp(1, i64::from(i32::MAX)),
                );
                command.insert("comment", on_server.comment());
                let work = async {
                    let run = database.run_command(command);
                    Ok(match from {
                        Some(from) => run.selection_criteria(from).await?,
                        None => run.await?,
                    })
                };
                on_server.ended(work.await)
            }
        })
    }
}

async fn all_of<T: DeserializeOwned>(mut cursor: Cursor<T>) -> Result<Vec<T>> {
    let mut found = Vec::new();
    while cursor.advance().await? {
        found.push(cursor.deserialize_current()?);
    }
    Ok(found)
}

/// An operation that the server may be at work on. Dropping it kills the operation there.
struct OnServer {
    client: Option<Client>,
    comment: String,
}

impl OnServer {
    fn new(client: &Client, limits: &Limits) -> Self {
        Self { client: Some(client.clone()), comment: format!("{} id={}", limits.comment, ObjectId::new()) }
    }

    fn comment(&self) -> Bson {
        Bson::String(self.comment.clone())
    }

    /// Where the server has answered, there is nothing to kill any more.
    fn ended<T>(mut self, result: Result<T>) -> Result<T> {
        if result.as_ref().err().is_none_or(|error| error.server_code().is_some()) {
            self.client = None;
        }
        result
    }
}

impl Drop for OnServer {
    fn drop(&mut self) {
        // Without a runtime there is nobody who could do it; the server's time limit remains.
        if let (Some(client), Ok(runtime)) = (self.client.take(), Handle::try_current()) {
            let comment = std::mem::take(&mut self.comment);
            runtime.spawn(async move {
                if let Err(error) = kill(&client, &comment).await {
                    tracing::warn!(kind = ?error.kind(), "an operation that nobody waits for any more could not be killed and runs until its time is over");
                }
            });
        }
    }
}

/// Kills what has this comment, on whichever member it is.
async fn kill(client: &Client, comment: &str) -> Result<()> {
    match whereabouts(client, LOOKS_FOR).await? {
        Whereabouts::Single => kill_at(client, None, comment).await,
        Whereabouts::Set(addresses) => {
            let mut members = JoinSet::new();
            for address in addresses {
                let (client, comment) = (client.clone(), comment.to_owned());
                members.spawn(async move { kill_at(&client, Some(only(&address)?), &comment).await });
            }
            let mut result = Ok(());
            while let Some(done) = members.join_next().await {
                match done? {
                    // What is down has nothing under way.
                    Err(error) if error.kind() != ErrorKind::Unavailable => result = Err(error),
                    _ => {}
                }
            }
            result
        }
        // Which of several routers has it the client does not tell, and the numbers of operations are each router's own.
        Whereabouts::Router => Err(Error::new(ErrorKind::Unsupported, "operations behind a router end by their time limit")),
    }
}

/// Kills what has this comment on one member, until there is nothing of it, a few times: it may be on its way still. Both commands go to the same member: numbers of operations mean something else
/// on another, and the driver sends a command to the primary unless it is told otherwise.
async fn kill_at(client: &Client, member: Option<SelectionCriteria>, comment: &str) -> Result<()> {
    let admin = client.database("admin");
    for look in 0..LOOKS {
        let mine = [
            doc! { "$currentOp": { "allUsers": false, "idleCursors": true } },
            doc! { "$match": { "$or": [{ "command.comment": comment }, { "cursor.originatingCommand.comment": comment }] } },
        ];
        let look_for = admin
            .aggregate(mine)
            .max_time(LOOKS_FOR)
            .optional(member.clone(), |look_for, member| look_for.selection_criteria(member));
        let look_for = async { all_of::<Document>(look_for.await?).await };
        let operations =
            timeout(LOOKS_FOR, look_for).await.map_err(|_| Error::new(ErrorKind::Timeout, "a member does not answer"))??;
        for id in operations.iter().filter_map(|operation| operation.get("opid")) {
            let kill = admin.run_command(doc! { "killOp": 1, "op": id.clone() });
            kill.optional(member.clone(), |kill, member| kill.selection_criteria(member)).await?;
        }
        if operations.is_empty() && look > 0 {
            return Ok(());
        }
        sleep(BETWEEN_LOOKS).await;
    }
    Err(Error::new(ErrorKind::Timeout, "an operation that was killed is still there"))
}

const LOOKS: u32 = 10;
const LOOKS_FOR: Duration = Duration::from_secs(5);
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
