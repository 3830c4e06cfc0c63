# Completion of chainfs for fish; chainfs itself tells what may follow.

function __chainfs_complete
    set -l words (commandline -opc) (commandline -ct)
    for line in (command $words[1] complete -- $words 2>/dev/null)
        switch $line
            case ':files*'
                __fish_complete_path (commandline -ct)
            case ':dirs*'
                __fish_complete_directories (commandline -ct)
            case '*'
                echo $line
        end
    end
end

complete -c chainfs -f -a '(__chainfs_complete)'
