//! Golden bytes of the messages whose numbers are easy to get wrong, written out by hand from the contract.
//!
//! A tag is `number << 3 | type`, with type 0 for a varint and 2 for what has a length.

use bytes::Bytes;
use prost::Message;

/// Encodes, compares, decodes again.
#[track_caller]
fn golden<M: Message + Default + PartialEq + std::fmt::Debug>(message: &M, expected: &[u8]) {
    let encoded = message.encode_to_vec();
    assert_eq!(encoded, expected, "{message:?}");
    assert_eq!(M::decode(expected).expect("golden bytes are valid"), *message);
}

mod etcd {
    use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
    use keelson_proto::etcdserverpb::{
        Compare, InternalRaftRequest, LeaseGrantRequest, Member, PutRequest, RequestHeader, RequestOp, ResponseHeader,
        StatusResponse, TxnRequest, WatchResponse, request_op,
    };
    use keelson_proto::mvccpb::{Event, KeyValue, event::EventType};

    use super::*;

    #[test]
    fn key_value_is_written_in_order_and_without_zeros() {
        let full = KeyValue {
            key: Bytes::from_static(b"k"),
            create_revision: 2,
            mod_revision: 3,
            version: 4,
            value: Bytes::from_static(b"v"),
            lease: 5,
        };
        golden(&full, &[0x0a, 1, b'k', 0x10, 2, 0x18, 3, 0x20, 4, 0x2a, 1, b'v', 0x30, 5]);
        let deleted = KeyValue { key: Bytes::from_static(b"k"), mod_revision: 300, ..Default::default() };
        golden(&deleted, &[0x0a, 1, b'k', 0x18, 0xac, 0x02]);
        golden(&KeyValue::default(), &[]);
    }

    #[test]
    fn a_negative_lease_takes_ten_bytes() {
        let expected = [0x30, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        golden(&KeyValue { lease: -1, ..Default::default() }, &expected);
    }

    #[test]
    fn decoding_from_bytes_shares_the_buffer() {
        let buffer = Bytes::from_static(&[0x0a, 1, b'k', 0x2a, 1, b'v']);
        let decoded = KeyValue::decode(buffer.clone()).unwrap();
        assert_eq!(decoded.value.as_ptr(), buffer[5..].as_ptr());
    }

    #[test]
    fn compare_has_its_range_end_far_away() {
        let compare = Compare {
            result: CompareResult::NotEqual.into(),
            target: CompareTarget::Mod.into(),
            key: Bytes::from_static(b"a"),
            target_union: Some(TargetUnion::ModRevision(7)),
            range_end: Bytes::from_static(b"b"),
        };
        golden(&compare, &[0x08, 3, 0x10, 2, 0x1a, 1, b'a', 0x30, 7, 0x82, 0x04, 1, b'b']);
        // A target that is set to zero is written: it differs from one that is not set.
        let absent = Compare { target_union: Some(TargetUnion::Version(0)), ..Default::default() };
        golden(&absent, &[0x20, 0]);
    }

    #[test]
    fn a_transaction_nests() {
        let put = RequestOp {
            request: Some(request_op::Request::RequestPut(PutRequest {
                key: Bytes::from_static(b"k"),
                ..Default::default()
            })),
        };
        let inner = TxnRequest { failure: vec![put], ..Default::default() };
        let nested = RequestOp { request: Some(request_op::Request::RequestTxn(inner)) };
        let outer = TxnRequest { success: vec![nested], ..Default::default() };
        golden(&outer, &[0x12, 9, 0x22, 7, 0x1a, 5, 0x12, 3, 0x0a, 1, b'k']);
    }

    #[test]
    fn watch_response_has_its_events_at_eleven() {
        let event = Event {
            r#type: EventType::Delete.into(),
            kv: Some(KeyValue { key: Bytes::from_static(b"k"), mod_revision: 2, ..Default::default() }),
            prev_kv: None,
        };
        let response = WatchResponse {
            header: Some(ResponseHeader { cluster_id: 1, member_id: 2, revision: 3, raft_term: 4 }),
            watch_id: 1,
            created: true,
            canceled: true,
            compact_revision: 6,
            cancel_reason: "x".to_owned(),
            fragment: true,
            events: vec![event],
        };
        golden(
            &response,
            &[
                0x0a, 8, 0x08, 1, 0x10, 2, 0x18, 3, 0x20, 4, // header
                0x10, 1, 0x18, 1, 0x20, 1, 0x28, 6, 0x32, 1, b'x', 0x38, 1, // the scalars
                0x5a, 9, 0x08, 1, 0x12, 5, 0x0a, 1, b'k', 0x18, 2, // events
            ],
        );
    }

    #[test]
    fn internal_raft_request_has_its_header_at_one_hundred() {
        let request = InternalRaftRequest {
            header: Some(RequestHeader { id: 9, username: "u".to_owned(), auth_revision: 3 }),
            lease_grant: Some(LeaseGrantRequest { ttl: 60, id: 7 }),
            ..Default::default()
        };
        golden(
            &request,
            &[
                0x42, 4, 0x08, 60, 0x10, 7, // lease_grant = 8
                0xa2, 0x06, 7, 0x08, 9, 0x12, 1, b'u', 0x18, 3, // header = 100
            ],
        );
    }

    #[test]
    fn members_and_status_keep_their_numbers() {
        let member = Member {
            id: 1,
            name: "n".to_owned(),
            peer_urls: vec!["p".to_owned()],
            client_urls: vec!["c".to_owned()],
            is_learner: true,
        };
        golden(&member, &[0x08, 1, 0x12, 1, b'n', 0x1a, 1, b'p', 0x22, 1, b'c', 0x28, 1]);
        let status = StatusResponse { db_size: 1, raft_applied_index: 2, db_size_in_use: 3, ..Default::default() };
        golden(&status, &[0x18, 1, 0x38, 2, 0x48, 3]);
        let status = StatusResponse { storage_version: "3".to_owned(), db_size_quota: 4, ..Default::default() };
        golden(&status, &[0x5a, 1, b'3', 0x60, 4]);
    }
}

#[cfg(feature = "internal")]
mod internal {
    use keelson_proto::etcdserverpb::LeaseKeepAliveRequest;
    use keelson_proto::membershippb::{Attributes, Member, RaftAttributes};
    use keelson_proto::peer::{ConfChangeContext, ForwardRequest, RaftBatch, forward_request};

    use super::*;

    #[test]
    fn a_batch_of_raft_messages_keeps_empty_ones_and_order() {
        let batch = RaftBatch {
            cluster_id: 1,
            from: 2,
            to: 3,
            protocol_version: 1,
            messages: vec![Bytes::from_static(b"m"), Bytes::new()],
        };
        golden(&batch, &[0x08, 1, 0x10, 2, 0x18, 3, 0x20, 1, 0x2a, 1, b'm', 0x2a, 0]);
    }

    #[test]
    fn a_forwarded_request_carries_etcds_message() {
        let request = ForwardRequest {
            request: Some(forward_request::Request::LeaseKeepAlive(LeaseKeepAliveRequest { id: 5 })),
            ..Default::default()
        };
        golden(&request, &[0x22, 2, 0x08, 5]);
    }

    #[test]
    fn a_configuration_change_carries_the_member() {
        let context = ConfChangeContext {
            member: Some(Member {
                id: 1,
                raft_attributes: Some(RaftAttributes { peer_urls: vec!["p".to_owned()], is_learner: true }),
                member_attributes: Some(Attributes { name: "n".to_owned(), client_urls: vec![] }),
            }),
            request_id: 2,
            promote: true,
        };
        golden(
            &context,
            &[0x0a, 14, 0x08, 1, 0x12, 5, 0x0a, 1, b'p', 0x10, 1, 0x1a, 3, 0x0a, 1, b'n', 0x10, 2, 0x18, 1],
        );
    }
}

#[cfg(feature = "k8s")]
mod k8s {
    use keelson_proto::k8s::core_v1::{self, ServicePort, ServiceSpec};
    use keelson_proto::k8s::discovery_v1::{self, EndpointConditions};
    use keelson_proto::k8s::intstr::IntOrString;
    use keelson_proto::k8s::meta_v1::{ObjectMeta, Time};
    use keelson_proto::k8s::runtime::{TypeMeta, Unknown};

    use super::*;

    #[test]
    fn the_envelope_names_version_before_kind() {
        let unknown = Unknown {
            type_meta: Some(TypeMeta { api_version: Some("v1".to_owned()), kind: Some("Service".to_owned()) }),
            raw: Some(Bytes::from_static(b"r")),
            content_encoding: Some(String::new()),
            content_type: Some(String::new()),
        };
        let mut expected = vec![0x0a, 13, 0x0a, 2, b'v', b'1', 0x12, 7];
        expected.extend(b"Service");
        // Kubernetes writes its empty strings, and so do we when they are set.
        expected.extend([0x12, 1, b'r', 0x1a, 0, 0x22, 0]);
        golden(&unknown, &expected);
    }

    #[test]
    fn a_service_keeps_its_addresses_at_three_and_eighteen() {
        let spec = ServiceSpec {
            ports: vec![ServicePort {
                port: Some(80),
                target_port: Some(IntOrString { r#type: Some(1), str_val: Some("w".to_owned()), ..Default::default() }),
                node_port: Some(0),
                ..Default::default()
            }],
            cluster_ip: Some("a".to_owned()),
            external_ips: vec!["e".to_owned()],
            publish_not_ready_addresses: Some(false),
            cluster_ips: vec!["a".to_owned(), "b".to_owned()],
            ip_families: vec!["4".to_owned()],
            internal_traffic_policy: Some("L".to_owned()),
            ..Default::default()
        };
        golden(
            &spec,
            &[
                0x0a, 11, 0x18, 80, 0x22, 5, 0x08, 1, 0x1a, 1, b'w', 0x28, 0, // ports
                0x1a, 1, b'a', // clusterIP = 3
                0x2a, 1, b'e', // externalIPs = 5
                0x68, 0, // publishNotReadyAddresses = 13
                0x92, 0x01, 1, b'a', 0x92, 0x01, 1, b'b', // clusterIPs = 18
                0x9a, 0x01, 1, b'4', // ipFamilies = 19
                0xb2, 0x01, 1, b'L', // internalTrafficPolicy = 22
            ],
        );
    }

    #[test]
    fn an_absent_condition_is_not_a_false_one() {
        let conditions = EndpointConditions { ready: Some(false), serving: None, terminating: Some(true) };
        golden(&conditions, &[0x08, 0, 0x18, 1]);
        golden(&EndpointConditions::default(), &[]);
    }

    #[test]
    fn the_two_endpoint_ports_differ() {
        let tcp = || Some("TCP".to_owned());
        let core = core_v1::EndpointPort { port: Some(80), protocol: tcp(), ..Default::default() };
        golden(&core, &[0x10, 80, 0x1a, 3, b'T', b'C', b'P']);
        let slice = discovery_v1::EndpointPort { port: Some(80), protocol: tcp(), ..Default::default() };
        golden(&slice, &[0x12, 3, b'T', b'C', b'P', 0x18, 80]);
    }

    #[test]
    fn labels_are_written_in_order() {
        let labels = [("b", "2"), ("a", "1")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        let meta = ObjectMeta {
            creation_timestamp: Some(Time { seconds: Some(5), nanos: Some(0) }),
            labels: labels.into(),
            ..Default::default()
        };
        golden(
            &meta,
            &[
                0x42, 4, 0x08, 5, 0x10, 0, // creationTimestamp = 8
                0x5a, 6, 0x0a, 1, b'a', 0x12, 1, b'1', 0x5a, 6, 0x0a, 1, b'b', 0x12, 1, b'2', // labels = 11
            ],
        );
    }

    #[test]
    fn managed_fields_are_skipped() {
        let stored = [0x0a, 1, b'n', 0x8a, 0x01, 3, 0x0a, 1, b'm'];
        let meta = ObjectMeta::decode(&stored[..]).unwrap();
        assert_eq!(meta, ObjectMeta { name: Some("n".to_owned()), ..Default::default() });
    }
}
