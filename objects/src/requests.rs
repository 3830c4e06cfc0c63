//! Requests within deadlines: attempts, back-off, a second request for a slow read, checks of replies.

use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::{Either, select};
use futures_util::{StreamExt, pin_mut};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta};

use crate::client::Bucket;
use crate::error::{ObjectError, ObjectErrorKind};

/// Objects that a listing has at most.
const MAX_OBJECTS: usize = 1_000_000;
/// Bytes up to which a read counts as small: small and large ones take different times.
const SMALL: u64 = 512 << 10;
/// A second request is never sent sooner.
const MIN_HEDGE: Duration = Duration::from_millis(10);
/// Listings may take so many times longer than other calls.
const LISTING_FACTOR: u32 = 10;
/// The part of the deadline that a call has after one that had no answer.
const DOWN_DIVISOR: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// How long requests may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The time after which a call ends with an error.
    pub deadline: Duration,
    /// Whether a read that takes longer than 95 % of the others is sent a second time.
    pub hedge: bool,
}

impl Default for Patience {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(30), hedge: true }
    }
}

impl Patience {
    /// The time for one attempt, so that a lost packet leaves time for more.
    pub(crate) fn attempt(&self) -> Duration {
        (self.deadline / 3).max(Duration::from_millis(500)).min(self.deadline)
    }
}

/// An object as a listing has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name, without the prefix of the bucket.
    pub name: String,
    /// Length in bytes.
    pub len: u64,
    /// Which version of it this is: the entity tag, or what else the server tells of it.
    pub version: String,
    /// When it was last changed, by the server's clock.
    pub modified: SystemTime,
}

/// What has happened since the bucket was opened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that were sent.
    pub requests: AtomicU64,
    /// Bytes of objects that were received.
    pub received: AtomicU64,
    /// Attempts after a failed one.
    pub retries: AtomicU64,
    /// Second requests for slow reads.
    pub hedges: AtomicU64,
    /// Those that were answered first.
    pub hedges_won: AtomicU64,
    /// Attempts without an answer in time.
    pub timeouts: AtomicU64,
    /// Replies that had another length or range than was asked for.
    pub wrong_replies: AtomicU64,
    /// Replies of another version than was asked for.
    pub changed: AtomicU64,
    /// Replies that credentials are missing, expired or not enough.
    pub denied: AtomicU64,
    /// Calls that failed in the end.
    pub failures: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }

    fn count(&self, error: &ObjectError) {
        match error.kind() {
            ObjectErrorKind::Changed => Self::add(&self.changed, 1),
            ObjectErrorKind::Denied => Self::add(&self.denied, 1),
            ObjectErrorKind::TimedOut => Self::add(&self.timeouts, 1),
            _ => {}
        }
    }
}

/// The version by which an object is known.
pub(crate) fn version_of(meta: &ObjectMeta) -> String {
    match &meta.e_tag {
        Some(tag) => tag.clone(),
        // A server without entity tags: what changes with nearly every write.
        None => format!("{}-{}", meta.last_modified.timestamp_micros(), meta.size),
    }
}

impl Bucket {
    /// All objects, sorted by name. Errors: no answer in time, no permission, too many.
    pub fn list(&self) -> Result<Vec<ObjectInfo>, ObjectError> {
        let shown = self.location().to_string();
        if let Some(pages) = self.index_pages() {
            return pages.list(self);
        }
        self.call_long(&shown, || async {
            let mut found = Vec::new();
            let mut listing = self.store().list(Some(self.prefix()));
            while let Some(meta) = listing.next().await {
                let meta = meta.map_err(|error| ObjectError::of(&shown, &error))?;
                if let Some(name) = self.name_of(&meta.location) {
                    found.push(info(name, &meta));
                }
                if found.len() > MAX_OBJECTS {
                    let text = format!("{shown} has over {MAX_OBJECTS} objects; name a longer prefix");
                    return Err(ObjectError::new(ObjectErrorKind::Limit, text));
                }
            }
            found.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(found)
        })
    }

    /// The object `name` as it is now.
    pub fn stat(&self, name: &str) -> Result<ObjectInfo, ObjectError> {
        let (path, shown) = self.path_of(name)?;
        self.call(&shown, || async {
            let options = GetOptions::new().with_head(true);
            let found = self.store().get_opts(&path, options).await;
            found
                .map(|found| info(name.to_owned(), &found.meta))
                .map_err(|error| ObjectError::of(&shown, &error))
        })
    }

    /// The bytes of a range of the object `name`, which lies within the object. `Changed` if the object is
    /// not `version` any more.
    pub fn read(&self, name: &str, range: Range<u64>, version: &str) -> Result<Vec<u8>, ObjectError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let (path, shown) = self.path_of(name)?;
        self.call(&shown, || self.read_once_or_twice(&path, &shown, &range, version))
    }

    /// The whole object `name`, of at most `max` bytes, and its version.
    pub fn read_whole(&self, name: &str, max: u64) -> Result<(Vec<u8>, ObjectInfo), ObjectError> {
        let (path, shown) = self.path_of(name)?;
        self.call(&shown, || async {
            let found = self.store().get_opts(&path, GetOptions::new()).await;
            let found = found.map_err(|error| ObjectError::of(&shown, &error))?;
            let info = info(name.to_owned(), &found.meta);
            if info.len > max {
                let text = format!("{shown} has {} bytes, and {max} at most are read", info.len);
                return Err(ObjectError::new(ObjectErrorKind::Limit, text));
            }
            let bytes = self.collect(found, &shown, info.len).await?;
            Ok((bytes, info))
        })
    }

    /// Runs attempts until one succeeds, fails for good, or the deadline has come.
    pub(crate) fn call<T, F: Future<Output = Result<T, ObjectError>>>(
        &self,
        shown: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, ObjectError> {
        self.call_within(None, shown, attempt)
    }

    /// The same for listings, which are many requests one after the other.
    pub(crate) fn call_long<T, F: Future<Output = Result<T, ObjectError>>>(
        &self,
        shown: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, ObjectError> {
        self.call_within(Some(self.patience().deadline * LISTING_FACTOR), shown, attempt)
    }

    /// `long`: the time for one attempt, which then may go on after the deadline.
    fn call_within<T, F: Future<Output = Result<T, ObjectError>>>(
        &self,
        long: Option<Duration>,
        shown: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, ObjectError> {
        let patience = self.patience();
        // While nothing answers, every caller tries, but none waits for long: `ls` asks for many objects.
        let deadline = if self.is_down() { patience.deadline / DOWN_DIVISOR } else { patience.deadline };
        let end = Instant::now() + deadline;
        let mut pause = FIRST_PAUSE;
        self.runtime().block_on(async {
            loop {
                let left = long
                    .unwrap_or_else(|| end.saturating_duration_since(Instant::now()).min(patience.attempt()));
                Counters::add(&self.counters().requests, 1);
                let answer = tokio::time::timeout(left, attempt()).await;
                let result = answer.unwrap_or_else(|_| {
                    let text = format!("{shown} could not be reached: no answer within {left:.1?}");
                    Err(ObjectError::new(ObjectErrorKind::TimedOut, text))
                });
                let Err(error) = result else {
                    self.set_down(false);
                    return result;
                };
                self.counters().count(&error);
                if !error.may_pass() || Instant::now() + pause >= end {
                    Counters::add(&self.counters().failures, 1);
                    self.set_down(error.may_pass());
                    return Err(error.with(self.hint()));
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
                Counters::add(&self.counters().retries, 1);
            }
        })
    }

    async fn read_once_or_twice(
        &self,
        path: &Path,
        shown: &str,
        range: &Range<u64>,
        version: &str,
    ) -> Result<Vec<u8>, ObjectError> {
        let is_large = range.end - range.start > SMALL;
        let high = if self.patience().hedge { self.latencies(is_large).lock().high() } else { None };
        let begun = Instant::now();
        let first = self.read_once(path, shown, range, version);
        let result = match high {
            None => first.await,
            Some(high) => {
                pin_mut!(first);
                let pause = tokio::time::sleep(high.max(MIN_HEDGE));
                pin_mut!(pause);
                match select(first, pause).await {
                    Either::Left((result, _)) => result,
                    Either::Right(((), first)) => {
                        Counters::add(&self.counters().requests, 1);
                        Counters::add(&self.counters().hedges, 1);
                        let second = self.read_once(path, shown, range, version);
                        pin_mut!(second);
                        match select(first, second).await {
                            // The first failure does not decide.
                            Either::Left((Err(error), second)) if error.may_pass() => second.await,
                            Either::Left((result, _)) => result,
                            Either::Right((Err(error), first)) if error.may_pass() => first.await,
                            Either::Right((result, _)) => {
                                Counters::add(&self.counters().hedges_won, 1);
                                result
                            }
                        }
                    }
                }
            }
        };
        if result.is_ok() {
            self.latencies(is_large).lock().add(begun.elapsed());
        }
        result
    }

    async fn read_once(
        &self,
        path: &Path,
        shown: &str,
        range: &Range<u64>,
        version: &str,
    ) -> Result<Vec<u8>, ObjectError> {
        // A version without a quotation mark is none that the server knows.
        let tag = (version.starts_with('"') || version.starts_with("W/")).then(|| version.to_owned());
        let options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone()))).with_if_match(tag);
        let found =
            self.store().get_opts(path, options).await.map_err(|error| ObjectError::of(shown, &error))?;
        // Some servers ignore the condition.
        if version_of(&found.meta) != version {
            let text = format!("{shown} was changed by another program");
            return Err(ObjectError::new(ObjectErrorKind::Changed, text));
        }
        if found.range != *range {
            return Err(self.wrong_reply(shown, "another range than was asked for"));
        }
        self.collect(found, shown, range.end - range.start).await
    }

    /// The bytes of a reply, which must be `len`.
    async fn collect(
        &self,
        found: object_store::GetResult,
        shown: &str,
        len: u64,
    ) -> Result<Vec<u8>, ObjectError> {
        let mut bytes = Vec::new();
        let mut stream = found.into_stream();
        while let Some(part) = stream.next().await {
            let part = part.map_err(|error| ObjectError::of(shown, &error))?;
            Counters::add(&self.counters().received, part.len() as u64);
            if bytes.len() as u64 + part.len() as u64 > len {
                return Err(self.wrong_reply(shown, "more bytes than were asked for"));
            }
            // Memory grows with what has arrived, not with what was announced.
            bytes.extend_from_slice(&part);
        }
        if bytes.len() as u64 == len { Ok(bytes) } else { Err(self.wrong_reply(shown, "too few bytes")) }
    }

    pub(crate) fn wrong_reply(&self, shown: &str, fact: &str) -> ObjectError {
        Counters::add(&self.counters().wrong_replies, 1);
        ObjectError::new(
            ObjectErrorKind::Failed,
            format!("{shown} could not be read: the server sent {fact}"),
        )
    }
}

pub(crate) fn info(name: String, meta: &ObjectMeta) -> ObjectInfo {
    ObjectInfo { name, len: meta.size, version: version_of(meta), modified: meta.last_modified.into() }
}
