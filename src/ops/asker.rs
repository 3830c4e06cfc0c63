//! The user by whose rights a command through a shared mount is judged.
//!
//! The rights are those of the thread that serves the command, from [`as_user`] until its result is dropped:
//! every scan for a plan is filtered by them. An accepted or resumed job has no user: its rights were checked
//! when it was accepted.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::store::{AccessJudge, Store, Subject};

thread_local! {
    static ASKER: RefCell<Option<Arc<Asker>>> = const { RefCell::new(None) };
}

/// A user, and the permissions as of the store's scan.
#[derive(Debug)]
pub(super) struct Asker {
    pub(super) subject: Subject,
    pub(super) judge: AccessJudge,
}

/// Until this is dropped, commands of this thread are a user's.
#[derive(Debug)]
#[must_use = "dropped at once, it judges nothing"]
pub struct AsUser {
    before: Option<Arc<Asker>>,
    /// It is this thread's.
    _here: PhantomData<*const ()>,
}

impl Drop for AsUser {
    fn drop(&mut self) {
        ASKER.set(self.before.take());
    }
}

/// Judges the commands of this thread by the user's rights to the files of `store`.
pub fn as_user(store: &Store, subject: &Subject) -> AsUser {
    let asker = Arc::new(Asker { subject: subject.clone(), judge: store.judge() });
    AsUser { before: ASKER.replace(Some(asker)), _here: PhantomData }
}

/// Judges the commands of this thread without a user: an accepted command continues without one.
pub(super) fn without_user() -> AsUser {
    AsUser { before: ASKER.take(), _here: PhantomData }
}

/// The user whose command this thread serves, with the permissions of this moment.
pub(super) fn asker(store: &Store) -> Option<Arc<Asker>> {
    let subject = ASKER.with_borrow(|asker| asker.as_ref().map(|asker| asker.subject.clone()))?;
    Some(Arc::new(Asker { subject, judge: store.judge() }))
}
