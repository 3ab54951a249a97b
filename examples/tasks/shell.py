"""What a shell command does to the machine, in one word."""

from tasks.task import Draw, Item, Task, label
from tasks.words import phrases, words

COMMANDS = {
    "reads": phrases(
        """
        cat {file}; ls -l {folder}; head -n {n} {file}; grep -n TODO {file}; wc -l {file}; du -sh
        {folder}; tail -f {file}; find {folder} -name '*.py'; less {file}; stat {file}; diff {file}
        {folder}/{file}; sort {file} | uniq -c | head
        """
    ),
    "writes": phrases(
        """
        cp {file} {folder}/; touch {file}; mkdir -p {folder}; echo done >> {file}; mv {file} {folder}/;
        tar -czf {folder}.tgz {folder}; sed -i s/a/b/ {file}; ln -s {file} {folder}/link; chmod 600
        {file}; date > {file}; gzip -k {file}; sort {file} > {folder}/sorted
        """
    ),
    "deletes": phrases(
        """
        rm {file}; rm -rf {folder}; rmdir {folder}; find {folder} -mtime +{n} -delete; git clean -fd
        {folder}; unlink {file}; shred -u {file}; rm -i {folder}/*; find {folder} -type f -exec rm {{}}
        +; truncate -s 0 {file}; rm -r {folder}/{file}; rm -v {folder}/{n}.log
        """
    ),
    "network": phrases(
        """
        curl -O https://{host}/{file}; wget {host}/{file}; ping -c {n} {host}; ssh {host}; scp {file}
        {host}:; git clone https://{host}/{folder}; dig {host}; nc {host} 80; rsync -a {folder} {host}:;
        curl -I https://{host}; traceroute {host}; curl -s {host}/{file}
        """
    ),
    "processes": phrases(
        """
        kill {n}; ps aux; pkill -f {file}; top -p {n}; killall {folder}; nice -n 5 ./{file}; jobs -l;
        kill -9 {n}; pgrep -l {folder}; renice 10 {n}; htop; ps -p {n} -o args
        """
    ),
}
FILES = words(
    """
    notes.txt data.csv main.py report.md server.log photo.jpg config.yaml users.json run.sh todo.txt
    a.out old.sql
    """
)
FOLDERS = words(
    """
    build src backup photos archive logs www cache drafts music tests temp
    """
)
HOSTS = words(
    """
    example.org files.example.net 10.0.0.7 mirror.example.com backup.local db1.internal git.example.org
    cdn.example.net
    """
)


def draw(source: Draw) -> Item:
    wanted = source.any(tuple(COMMANDS))
    return Item(
        source.one(COMMANDS[wanted]).format(
            file=source.one(FILES),
            folder=source.one(FOLDERS),
            host=source.one(HOSTS),
            n=source.number(2, 9999),
        ),
        wanted,
    )


TASK = Task(
    "shell",
    "what a shell command does, one of five",
    f"What does the shell command do? One word: {', '.join(COMMANDS)}.",
    draw,
    label(COMMANDS),
    max_tokens=16,
)
