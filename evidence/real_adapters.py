import shutil, subprocess
shutil.rmtree('/work/wt/evidence/evidence')
subprocess.run(['bash','/work/scratch/q/mixjob.sh'])
