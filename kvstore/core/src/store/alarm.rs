//! Alarms: which members raised what. Replicated; every member refuses writes by all members' alarms.

use std::collections::BTreeSet;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use bytes::Bytes;
use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::{AlarmMember, AlarmRequest, AlarmType};

use crate::backend::{Direction, Read, Table, WriteBatch};
use crate::types::MemberId;
use crate::{Fatal, keys};

#[derive(Debug)]
pub(crate) struct Alarms {
    raised: BTreeSet<(MemberId, i32)>,
    list: Arc<Vec<AlarmMember>>,
}

impl Alarms {
    pub(crate) fn open<R: Read>(read: &R) -> Result<Alarms, Fatal> {
        let mut raised = Ok(BTreeSet::new());
        read.scan(Table::Alarm, (Bound::Unbounded, Bound::Unbounded), Direction::Forward, &mut |key, _| match (
            &mut raised,
            keys::decode_alarm(key),
        ) {
            (Ok(raised), Ok(alarm)) => {
                raised.insert(alarm);
                ControlFlow::Continue(())
            }
            (_, Err(error)) => {
                raised = Err(error);
                ControlFlow::Break(())
            }
            (Err(_), Ok(_)) => ControlFlow::Break(()),
        })?;
        let mut alarms = Alarms { raised: raised?, list: Arc::default() };
        alarms.publish();
        Ok(alarms)
    }

    fn publish(&mut self) {
        let list = self.raised.iter().map(|&(member, alarm)| AlarmMember { member_id: member.0, alarm });
        self.list = Arc::new(list.collect());
    }

    pub(crate) fn list(&self) -> Arc<Vec<AlarmMember>> {
        self.list.clone()
    }

    pub(crate) fn stands(&self, alarm: AlarmType) -> bool {
        self.raised.iter().any(|&(_, raised)| raised == alarm as i32)
    }

    /// Does what the request says. Gives the alarms of the answer, and whether any changed.
    pub(crate) fn apply(&mut self, request: &AlarmRequest, batch: &mut WriteBatch) -> (Vec<AlarmMember>, bool) {
        let alarm = (MemberId(request.member_id), request.alarm);
        let one = || vec![AlarmMember { member_id: request.member_id, alarm: request.alarm }];
        match AlarmAction::try_from(request.action) {
            Ok(AlarmAction::Get) => {
                let wanted = |m: &&AlarmMember| request.alarm == AlarmType::None as i32 || m.alarm == request.alarm;
                (self.list.iter().filter(wanted).copied().collect(), false)
            }
            Ok(AlarmAction::Activate) if request.alarm != AlarmType::None as i32 => {
                let changed = self.raised.insert(alarm);
                if changed {
                    batch.put(Table::Alarm, keys::alarm(alarm.0, alarm.1), Bytes::new());
                    self.publish();
                }
                (one(), changed)
            }
            Ok(AlarmAction::Deactivate) if self.raised.remove(&alarm) => {
                batch.delete(Table::Alarm, keys::alarm(alarm.0, alarm.1));
                self.publish();
                (one(), true)
            }
            Ok(AlarmAction::Activate | AlarmAction::Deactivate) | Err(_) => (Vec::new(), false),
        }
    }
}
