//! The end of a run: when it is reached, and what is judged then.

use std::hash::{Hash, Hasher};

use check::history::Ended;
use check::revision::Change;
use kvstore_core::backend::memory::MemoryView;
use kvstore_core::backend::{Backend, Table};

use super::Cluster;
use crate::Report;
use crate::clock::MS;

impl Cluster {
    pub(super) fn all_equal(&self) -> bool {
        let last = self.model.last_committed();
        self.members.iter().all(|member| {
            member.running.as_ref().is_some_and(|running| {
                running.published.facts.applied_index == last
                    && running.jobs.is_empty()
                    && !running.published.facts.compacting
                    && running.replica.status().last_index == last
            })
        }) && self.leases_ended()
            && {
                let changes = self.model.changes();
                self.watchers.iter().all(|watcher| watcher.up_to_date(&changes))
            }
    }

    pub(super) fn judge(&mut self) -> Result<Report, String> {
        let views: Vec<MemoryView> = self.members.iter().map(|member| member.disk.state.view()).collect();
        for table in Table::ALL {
            let first = views[0].rows(table);
            for (at, view) in views.iter().enumerate().skip(1) {
                let rows = view.rows(table);
                if rows != first {
                    let odd = first.iter().zip(&rows).position(|(a, b)| a != b).unwrap_or(first.len().min(rows.len()));
                    return Err(format!(
                        "table {} differs between members 1 and {} at row {odd} of {} and {}: {:?} and {:?}",
                        table.name(),
                        at + 1,
                        first.len(),
                        rows.len(),
                        first.get(odd),
                        rows.get(odd),
                    ));
                }
                first.len().hash(&mut self.digest);
            }
        }
        let changes = self.model.changes();
        let judged: Vec<Change> = changes.iter().filter(|change| change.key.starts_with('k')).cloned().collect();
        let history = &self.workload.history;
        check::revision::judge_time(history)?;
        check::revision::judge_kept(history, &judged)?;
        check::linear::judge(&check::revision::resolve(history, &judged))?;
        self.keepers.judge(self.clock.now() / MS)?;
        (self.report.kept, self.report.ended) = (self.keepers.promises(), self.keepers.ended());
        for watcher in &self.watchers {
            watcher.judge(&changes)?;
            self.report.watched += watcher.events();
        }
        self.report.operations = history.len();
        self.report.answered =
            history.iter().filter(|operation| matches!(operation.ended, Ended::Answered { .. })).count();
        self.report.elections = self.model.elections();
        self.report.virtual_ms = self.clock.now() / MS;
        self.report.digest = self.digest.finish();
        Ok(self.report)
    }
}
