//! The log thread: one batch and one fsync for everything that waits.
//!
//! While one batch is being synced the next one fills; that is where throughput comes from. Reads of old entries for
//! followers that lag run here too, behind the writes that were asked for before them.

use kvstore_core::Fatal;
use kvstore_core::replica::{Fetch, LogWrite};

use crate::clock;
use crate::counts::Histogram;
use crate::disk::Log;
use crate::driver::Input;
use crate::mailbox::{Mailbox, Receiver};

/// What the log thread is asked.
pub(crate) enum Job {
    Write(LogWrite),
    Fetch(Fetch),
    /// Everything asked before is done; the thread ends.
    Stop,
}

pub(crate) fn run(
    mut log: Log,
    jobs: &Receiver<Job>,
    driver: &Mailbox<Input>,
    fsyncs: &Histogram,
) -> Result<(), Fatal> {
    let mut batch = Vec::new();
    loop {
        jobs.take(&mut batch, None);
        let (mut writes, mut fetches, mut stop) = (Vec::with_capacity(batch.len()), Vec::new(), false);
        for job in batch.drain(..) {
            match job {
                Job::Write(write) => writes.push(write),
                Job::Fetch(fetch) => fetches.push(fetch),
                Job::Stop => stop = true,
            }
        }
        if let Some(number) = writes.last().map(|write| write.number) {
            let begun = clock::now();
            log.write(&writes)?;
            fsyncs.observe(begun.elapsed());
            // A raft thread that has gone needs no answer: the member is stopping.
            let _ = driver.push(Input::Persisted { number });
        }
        for fetch in &fetches {
            let entries = log.fetch(fetch)?;
            let _ = driver.push(Input::Fetched { id: fetch.id, entries });
        }
        if stop {
            return log.sync();
        }
    }
}
