// What a program that uses Node's etcd3 sees of a store: printed line by line, so that two stores can be compared.
//
// Usage: story.js PORT. Nothing that a store may choose (ids, times) is printed.
'use strict';

const { Etcd3 } = require('etcd3');

const say = (what, ...values) => console.log(`${what}:`, ...values.map((value) => JSON.stringify(value)));

// Prints what a call that is to fail fails with.
const attempt = async (what, call) => {
  try {
    say(what, 'no error', await call());
  } catch (error) {
    say(what, error.constructor.name, error.message.replace(/\d{6,}/g, 'ID'));
  }
};

const shown = (kv) => ({
  key: kv.key.toString(),
  value: kv.value.toString(),
  revisions: [kv.create_revision, kv.mod_revision, kv.version],
  leased: kv.lease !== '0',
});

// The next `count` of what an emitter says under these names, in order.
const hear = (emitter, names, count) =>
  new Promise((resolve, reject) => {
    const heard = [];
    for (const name of names) {
      emitter.on(name, (...values) => {
        heard.push([name, ...values]);
        if (heard.length === count) resolve(heard);
      });
    }
    if (!names.includes('error')) emitter.on('error', reject);
  });

async function keys(client) {
  const put = await client.put('k/1').value('one').exec();
  say('put', put.header.revision);
  say('put with the old', shown((await client.put('k/1').value('uno').getPrevious())));
  for (const [key, value] of [['k/2', 'two'], ['k/3', 'three'], ['k/4', '']]) await client.put(key).value(value);
  say('get', await client.get('k/1'), await client.get('nothing'));
  say('get at a revision', await client.get('k/1').revision(put.header.revision).string());
  say('get serializable', (await client.get('k/1').serializable(true).exec()).kvs.map(shown));
  say('exists', await client.get('k/4').exists(), await client.get('k/9').exists());
  for (const target of ['Key', 'Value', 'Version', 'Create', 'Mod']) {
    for (const order of ['Ascend', 'Descend']) {
      const answer = await client.getAll().prefix('k/').sort(target, order).limit(3).exec();
      say('sorted', target, order, answer.count, answer.more, answer.kvs.map(shown));
    }
  }
  say('keys', await client.getAll().prefix('k/').keys());
  say('strings', await client.getAll().prefix('k/').strings());
  say('count', await client.getAll().prefix('k/').count());
  say('range', await client.getAll().inRange({ start: 'k/2', end: 'k/4' }).keys());
  say('filters', await client.getAll().prefix('k/').minModRevision(4).maxModRevision(5).keys());
  say('namespace', await client.namespace('k/').getAll().keys(), await client.namespace('k/').get('3'));
  const gone = await client.delete().key('k/3').getPrevious();
  say('delete', gone.map(shown), (await client.delete().key('k/3').exec()).deleted);
  say('delete prefix', (await client.delete().prefix('k/').exec()).deleted);
  say('touch nothing', (await client.getAll().exec()).count);
  await attempt('empty key', () => client.put('').value('v').exec());
  await attempt('value of nothing', () => client.put('nothing').ignoreValue().exec());
  await attempt('the future', () => client.get('k').revision(100000).exec());
}

async function transactions(client) {
  await client.put('t').value('1');
  for (const [column, operator, value] of [
    ['Value', '==', '1'],
    ['Value', '!=', '1'],
    ['Value', '<', '2'],
    ['Version', '>', 0],
    ['Create', '==', 0],
    ['Mod', '>', 1],
    ['Lease', '==', 0],
  ]) {
    const answer = await client
      .if('t', column, operator, value)
      .then(client.put('t').value('1'), client.get('t'))
      .else(client.get('t'), client.delete().key('nothing'))
      .commit();
    const reads = answer.responses.filter((one) => one.response === 'response_range');
    say('txn', column, operator, answer.succeeded, reads.map((one) => one.response_range.kvs.map(shown)));
  }
  await attempt('txn twice', () => client.if('t', 'Version', '>', 0).then(client.put('t').value('1'), client.put('t').value('2')).commit());
  const other = client.stm({ retries: 3 });
  const sum = await other.transact(async (tx) => {
    const was = Number(await tx.get('t'));
    await tx.put('t').value(String(was + 1));
    return was + 1;
  });
  say('stm', sum, await client.get('t'));
}

async function leases(client) {
  const lease = client.lease(60, { autoKeepAlive: false });
  await lease.put('l/1').value('one');
  await lease.put('l/2').value('two');
  say('leased', (await client.getAll().prefix('l/').exec()).kvs.map(shown));
  say('kept alive', (await lease.keepaliveOnce()).TTL);
  await lease.revoke();
  say('revoked', await client.get('l/1'), lease.revoked());
  await attempt('put with it', () => lease.put('l/1').value('one').exec());
  await attempt('keep it alive', () => lease.keepaliveOnce());

  // Renewed by the client until it lets go; then it runs out.
  const short = client.lease(2);
  const watcher = await client.watch().key('l/short').create();
  const renewed = hear(short, ['keepaliveSucceeded'], 2);
  const events = hear(watcher, ['put', 'delete'], 2);
  await short.put('l/short').value('kept');
  say('renewed', (await renewed).map(([name, answer]) => [name, answer.TTL]), await client.get('l/short'));
  short.release();
  say('expiry', (await events).map(([name, kv]) => [name, kv.key.toString()]));
  await watcher.cancel();
}

async function watches(client) {
  const start = Number((await client.put('w/1').value('one').exec()).header.revision);
  await client.put('w/1').value('uno');
  await client.put('w/2').value('two');
  await client.delete().key('w/1');
  const told = ([name, kv, old]) => [name, kv.key.toString(), kv.value.toString(), kv.mod_revision - start, old && old.value.toString()];

  const past = client.watch().prefix('w/').startRevision(String(start)).withPreviousKV().watcher();
  say('past', (await hear(past, ['put', 'delete'], 4)).map(told));
  const live = hear(past, ['put', 'delete'], 2);
  await client.if('w/1', 'Version', '==', 0).then(client.put('w/3').value('a'), client.delete().key('w/2')).commit();
  say('live', (await live).map(told));
  await past.cancel();

  const only = client.watch().prefix('w/').startRevision(String(start)).only('delete').watcher();
  say('only deletes', (await hear(only, ['put', 'delete'], 2)).map(told));
  await only.cancel();

  const batches = client.watch().inRange({ start: 'w/1', end: 'w/3' }).startRevision(String(start)).watcher();
  const [[, answer]] = await hear(batches, ['data'], 1);
  say('range', answer.header.revision - start, answer.events.map((event) => [event.type, event.kv.key.toString()]));
  await batches.cancel();
}

async function locks(client, other) {
  const mine = client.lock('lock').ttl(60);
  await mine.acquire();
  await attempt('in vain', () => other.lock('lock').ttl(60).acquire());
  await mine.release();
  const theirs = await other.lock('lock').ttl(60).acquire();
  say('handed over', (await client.getAll().exec()).kvs.filter((kv) => kv.lease !== '0').length);
  await theirs.release();
  say('do', await client.lock('lock').do(async () => 'done'));

  const [one, two] = [client.election('e', 60), other.election('e', 60)];
  const first = one.campaign('one');
  await first.wait();
  const second = two.campaign('two');
  while ((await client.getAll().prefix('election/e/').count()) < 2) await second.getCampaignKey();
  const observer = await one.observe();
  say('leader', observer.leader(), await two.leader());
  const changed = hear(observer, ['change'], 1);
  const elected = second.wait();
  await first.resign();
  await elected;
  say('next', await two.leader(), (await changed).length);
  const proclaimed = hear(observer, ['change'], 1);
  await second.proclaim('two, again');
  say('proclaimed', (await proclaimed)[0][1]);
  await observer.cancel();
  await second.resign();
  say('no leader', (await one.leader()) ?? null);
}

async function cluster(client) {
  const status = await client.maintenance.status();
  say('status', status.version.replace(/\.\d+$/, ''), Number(status.raftIndex) > 0, status.leader !== '0');
  const members = await client.cluster.memberList({});
  say('members', members.members.map((member) => [member.name, member.peerURLs.length, member.clientURLs.length]));
  say('alarms', (await client.maintenance.alarm({ action: 'Get' })).alarms);
}

async function main() {
  const port = Number(process.argv[2]);
  const [client, other] = [0, 1].map(() => new Etcd3({ hosts: `http://127.0.0.1:${port}` }));
  for (const part of [keys, transactions, leases, watches]) await part(client);
  await locks(client, other);
  await cluster(client);
  client.close();
  other.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
